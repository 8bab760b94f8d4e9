"""One of two processes: join, meet, share, sum over both, and say what came out as JSON.

python worker.py COORDINATOR PROCESS_ID
"""

import json
import os
import pathlib
import sys

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


def main(coordinator, process_id):
    """Run one process."""
    tx.initialize(coordinator, num_processes=2, process_id=process_id, timeout_s=60)
    seen = {
        "backend_after_initialize": _compat.backend_started(),
        "listening_before_backend": listening(),
    }
    tx.barrier("both-are-here", timeout_s=60)
    seen["shared"] = launch.share("greeting", f"from process {process_id}", timeout_s=60)
    seen["backend_after_share"] = _compat.backend_started()

    mesh = tx.MeshSpec(axes=("data",))
    own = np.float32([10.0 ** jax.process_index()])
    x = jax.make_array_from_process_local_data(mesh.sharding("data"), own, (mesh.size,))
    summed = jax.jit(
        jax.shard_map(
            lambda x: tx.psum(x, "data"), mesh=mesh.mesh, in_specs=P("data"), out_specs=P()
        )
    )(x)
    seen |= {
        "sum": np.asarray(summed).tolist(),
        "rank": mesh.rank(),
        "coordinates": mesh.coordinates(),
        "size": mesh.size,
        "listening_with_backend": listening(),
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
