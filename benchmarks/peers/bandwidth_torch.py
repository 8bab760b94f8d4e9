"""A rank of torch.distributed over gloo that makes all-reduces as its stdin asks for them.

python bandwidth_torch.py HOST:PORT PROCESSES RANK DEVICES ANSWERS
"""

import json
import os
import resource
import sys
import time

import torch
import torch.distributed


def main() -> None:
    """Serve calls: each sums in place, as torch does."""
    address, processes, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(int(sys.argv[5]), "w", encoding="utf-8")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://{address}", rank=rank, world_size=processes
    )
    print(json.dumps({"torch": torch.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        x = torch.full((asked["size"] // 4,), float(rank + 1))
        torch.distributed.all_reduce(x)
        assert bool((x == processes * (processes + 1) / 2).all())
        x.zero_()
        seconds = []
        began = _cpu()
        for _ in range(asked["calls"]):
            start = time.perf_counter()
            torch.distributed.all_reduce(x)
            seconds.append(time.perf_counter() - start)
        spent = _cpu() - began
        print(json.dumps({"seconds": seconds, "cpu_seconds": spent}), file=answers, flush=True)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
