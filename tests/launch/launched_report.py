"""Say as one line of JSON what this process is, and what it was given."""

import json
import os
import sys

print(
    json.dumps(
        {
            "argv": sys.argv[1:],
            "executable": sys.executable,
            "cwd": os.getcwd(),
            "env": dict(os.environ),
            "pid": os.getpid(),
            "session": os.getsid(0),
            "cores": sorted(os.sched_getaffinity(0)),
        }
    )
)
