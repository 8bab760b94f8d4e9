"""Measure the watch and the pre-flight: what they cost, and how fast a fault ends all ranks.

python tests/launch/watch_times.py [REPEATS]     (a minute a repeat)
"""

import json
import pathlib
import re
import signal
import statistics
import sys
import time
import timeit

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import watch_run
from watch_worker import join

HERE = pathlib.Path(__file__)
FAULTS = [
    ("kill -9", signal.SIGKILL, 2, 0),
    ("kill -9", signal.SIGKILL, 2, 1),
    ("kill -9", signal.SIGKILL, 3, 0),
    ("kill -9", signal.SIGKILL, 3, 2),
    ("SIGSTOP", signal.SIGSTOP, 3, 0),
    ("SIGSTOP", signal.SIGSTOP, 3, 1),
]


def times_of(sign, world, victim):
    """Return the seconds from a signal to the end of each other rank, by the default timeouts."""
    ranks = watch_run.start(world, steps=10**6, step_s=0.02)
    try:
        watch_run.wait_until(lambda: all(rank.said("made 10") for rank in ranks))
        time.sleep(1)
        sent = time.time()
        ranks[victim].process.send_signal(sign)
        others = [rank for number, rank in enumerate(ranks) if number != victim]
        watch_run.wait_until(lambda: all(rank.ended for rank in others))
        assert all(re.search(rf"^txcore: .*: rank {victim} ", rank.err, re.M) for rank in others)
        return [rank.ended - sent for rank in others]
    finally:
        watch_run.kill(ranks)


def cost(coordinator, rank, world, plan):
    """Print what watching costs in one of several ranks that do nothing else."""
    from txcore.launch.watch import watch

    join(coordinator, rank, world)
    if plan["on"]:
        watch.start()
    time.sleep(1)
    before = time.process_time()
    time.sleep(10)
    share = (time.process_time() - before) / 10
    rounds = 100_000
    calls = {"at": lambda: watch.at("step", 5, "step"), "reach": lambda: watch.reach(5)}
    each = {k: min(timeit.repeat(f, number=rounds, repeat=5)) / rounds for k, f in calls.items()}
    print("cost", json.dumps({"CPU share": share, **each}))


def costs(world, on):
    """Return what each rank printed."""
    ranks = watch_run.start(world, HERE, on=on)
    watch_run.finish(ranks)
    return [json.loads(re.findall(r"^cost (.*)$", rank.out, re.M)[0]) for rank in ranks]


def preflight_s(world):
    """Return the median seconds of a check, and the longest."""
    ranks = watch_run.start(world, HERE.with_name("preflight_worker.py"), times=50)
    watch_run.finish(ranks, 300)
    return json.loads(re.findall(r"equal (.*)$", ranks[0].out, re.M)[0])


def main(repeats):
    """Print all figures."""
    for name, sign, world, victim in FAULTS:
        times = [s for _ in range(repeats) for s in times_of(sign, world, victim)]
        print(
            f"{name} rank {victim} of {world}: {min(times):.2f} to {max(times):.2f} s", flush=True
        )
    for on in (False, True):
        rows = costs(3, on)
        share = max(row["CPU share"] for row in rows)
        at, reach = (statistics.median(row[name] for row in rows) for name in ("at", "reach"))
        print(f"watch {'on' if on else 'off'}: {share:.2%} of a core, ", end="")
        print(f"at {at * 1e9:.0f} ns, reach {reach * 1e9:.0f} ns", flush=True)
    for world in (2, 3, 8):
        median, longest = preflight_s(world)
        print(f"pre-flight of {world}: {median * 1e3:.1f} ms (at most {longest * 1e3:.0f} ms)")


if __name__ == "__main__":
    if len(sys.argv) == 5:
        cost(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
