"""One process of a run: join, meet, share, sum over all, and say what came out as JSON.

python worker.py [JSON]

JSON has the arguments of tx.initialize (none: from the environment), and what else to do:
"stay_until": sum again once this file is there; "linger": seconds to go on after the last word;
"fail": end with an exception.
"""

import json
import os
import pathlib
import signal
import sys
import time

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore import _compat, launch

PROC = pathlib.Path("/proc/self")
LISTEN = "0A"  # TCP_LISTEN in Linux's include/net/tcp_states.h


def listening():
    """Return "address:port" in hexadecimal of each socket that this process listens on."""
    if not (PROC / "net").exists():
        return None
    links = [os.readlink(fd) for fd in (PROC / "fd").iterdir() if fd.is_symlink()]
    inodes = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    tables = [PROC / "net" / name for name in ("tcp", "tcp6")]
    texts = [t.read_text() for t in tables if t.exists()]
    rows = [line.split() for text in texts for line in text.splitlines()[1:]]
    return sorted(row[1] for row in rows if row[3] == LISTEN and row[9] in inodes)


def sum_over_all(mesh):
    """Return the sum of 10**rank over the mesh."""
    own = np.float32([10.0 ** jax.process_index()])
    x = jax.make_array_from_process_local_data(mesh.sharding("data"), own, (mesh.size,))
    summed = jax.jit(
        jax.shard_map(
            lambda x: tx.psum(x, "data"), mesh=mesh.mesh, in_specs=P("data"), out_specs=P()
        )
    )(x)
    return np.asarray(summed).tolist()


def main(stay_until=None, linger=0.0, fail=None, **arguments):
    """Run one process."""
    heard = []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    started = time.monotonic()
    tx.initialize(**arguments)
    seen = {
        "joined_in_s": time.monotonic() - started,
        "backend_after_initialize": _compat.backend_started(),
        "listening_before_backend": listening(),
    }
    tx.barrier("all-are-here", timeout_s=60)
    rank = _compat.coordination_rank()
    seen["shared"] = launch.share("greeting", f"from process {rank}", timeout_s=60)
    seen["backend_after_share"] = _compat.backend_started()

    mesh = tx.MeshSpec(axes=("data",))
    seen |= {
        "sum": sum_over_all(mesh),
        "position": mesh.position(),
        "coordinates": mesh.coordinates(),
        "size": mesh.size,
        "listening_with_backend": listening(),
    }
    if fail:
        raise ValueError(fail)
    if stay_until:
        print(json.dumps(seen), flush=True)
        while not pathlib.Path(stay_until).exists():
            time.sleep(0.05)
        seen["sum"] = sum_over_all(mesh)
    os.kill(os.getpid(), signal.SIGTERM)
    seen["heard_sigterm"] = heard == [signal.SIGTERM]
    print(json.dumps(seen), flush=True)
    time.sleep(linger)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}"))
