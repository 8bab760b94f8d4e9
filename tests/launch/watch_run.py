"""Start the ranks of watch_worker.py, and see how each ends and when."""

import json
import pathlib
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

from processes import free_port, patience, rank_environment

WORKER = pathlib.Path(__file__).with_name("watch_worker.py")
DEADLINE_S = 90


@dataclass
class Rank:
    """A rank's process, what it wrote, and when it ended (seconds since the epoch)."""

    process: subprocess.Popen
    out: str = ""
    err: str = ""
    ended: float = 0.0
    threads: list = field(default_factory=list)

    @property
    def code(self):
        return self.process.returncode

    def read(self, name):
        with getattr(self.process, f"std{name}") as stream:
            for line in stream:
                setattr(self, name, getattr(self, name) + line)

    def see_to_the_end(self):
        self.process.wait()
        self.ended = time.time()

    def said(self, what):
        """Return when the rank said something, or None."""
        rows = [line.split(" ", 1) for line in self.out.splitlines() if " " in line]
        return next((float(at) for at, text in rows if text.startswith(what)), None)


def start(world, worker=WORKER, **plan):
    """Start all ranks."""
    coordinator = f"127.0.0.1:{free_port()}"
    environment = rank_environment()
    ranks = []
    for rank in range(world):
        process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "error",
                worker,
                coordinator,
                str(rank),
                str(world),
                json.dumps(plan),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment | plan.get("env", {}).get(str(rank), {}),
        )
        ranks.append(Rank(process))
        jobs = [
            (ranks[-1].read, ("out",)),
            (ranks[-1].read, ("err",)),
            (ranks[-1].see_to_the_end, ()),
        ]
        ranks[-1].threads = [threading.Thread(target=f, args=a, daemon=True) for f, a in jobs]
        for thread in ranks[-1].threads:
            thread.start()
    return ranks


def kill(ranks):
    """End what is left of a run."""
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.kill()  # also one that is stopped
        for thread in rank.threads:
            thread.join(10)


def wait_until(there, seconds=DEADLINE_S):
    """Wait until something is so."""
    deadline = time.monotonic() + patience(seconds)
    while not there():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def finish(ranks, seconds=DEADLINE_S):
    """Wait for the ranks' ends; kill what is left, and fail if that is anybody."""
    deadline = time.monotonic() + patience(seconds)
    for rank in ranks:
        rank.threads[-1].join(max(0.0, deadline - time.monotonic()))
    late = [number for number, rank in enumerate(ranks) if rank.process.poll() is None]
    kill(ranks)
    assert not late, f"ranks {late} did not end:\n" + "\n".join(r.out + r.err for r in ranks)
