"""Compare the all-reduce of torch.distributed, plain jax and txcore on two cores, by size.

    python benchmarks/peers/bandwidth.py --peers-python .venv-peers/bin/python

Over 2 and 4 processes (gloo), and over 2 devices of one process, where there is no torch: float32,
in rounds in which each contender has its turn, in an order shuffled anew. README.md beside this
file says how each is run.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import pool
import report

RESULTS = pool.HERE.parent / "results"
TORCH, JAX = "bandwidth_torch.py", "bandwidth_jax.py"
PEER, PLAIN = "torch gloo", "lax.psum"
MIB = 1 << 20


class Group(NamedTuple):
    """One kind of run: so many processes, and devices in each."""

    processes: int
    devices: int

    def __str__(self) -> str:
        """Return how it is called in the tables."""
        if self.processes == 1:
            return f"{self.devices} devices in one process"
        return f"{self.processes} processes"


GROUPS = (Group(2, 1), Group(4, 1), Group(1, 2))


class Call(NamedTuple):
    """One contender: the worker that runs it, and what it is told."""

    worker: str  # a key of `Workers`
    form: str


class Measured(NamedTuple):
    """Hold one turn: the mean over ranks of their median, and CPU of all ranks, of one call."""

    seconds: float
    cpu_seconds: float


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--peers-python", help="interpreter of the peers' environment; default: none, no torch")
    add("--rounds", type=int, default=5, help="default: 5")
    add("--min-kib", type=int, default=4, help="smallest size; default: 4")
    add("--max-mib", type=int, default=256, help="largest size; default: 256")
    add("--factor", type=int, default=4, help="from one size to the next; default: 4")
    add("--groups", default="2x1,4x1,1x2", help="processes x devices; default: 2x1,4x1,1x2")
    add(
        "--algorithms",
        default="plain,chunked,reduce_scatter_all_gather,ring,recursive_doubling",
        help="of txcore, by name",
    )
    add("--name", default="bandwidth", help="of the files under benchmarks/results")
    args = parser.parse_args(argv)
    args.groups = [Group(*map(int, text.split("x"))) for text in args.groups.split(",")]
    return args


def calls_for(size: int) -> int:
    """Return how many calls a turn has: fewer of those that take long."""
    most = {MIB // 4: 100, MIB: 40, 16 * MIB: 15, 64 * MIB: 5}
    return next((calls for limit, calls in most.items() if size <= limit), 3)


class Workers:
    """The processes of one group of ranks that run one library, idle between their turns."""

    def __init__(self, python: str, script: str, group: Group, cores: Sequence[int], *flags: str):
        self._answers: list[IO[str]] = []
        self._errors: list[IO[str]] = []
        self._processes: list[subprocess.Popen[str]] = []
        (port,) = pool.free_ports(1)
        pinned = pool.divide_cores(cores, group.processes)
        if group.processes > len(cores):
            pinned = [cores] * group.processes
        with contextlib.ExitStack() as stack:
            for rank in range(group.processes):
                errors = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
                answers, end = os.pipe()
                self._answers.append(stack.enter_context(os.fdopen(answers)))
                self._errors.append(errors)
                place = f"127.0.0.1:{port}", group.processes, rank, group.devices, end
                process = pool.start_worker(
                    [python, str(pool.HERE / script), *map(str, place), *flags],
                    pinned[rank],
                    stdin=subprocess.PIPE,
                    stdout=errors,
                    stderr=errors,
                    pass_fds=[end],
                    start_new_session=True,  # as txcore launch and torchrun start theirs
                )
                os.close(end)
                stack.enter_context(process)
                stack.callback(process.kill)
                self._processes.append(process)
            self.versions = self._hear()[0]
            self._stack = stack.pop_all()

    def run(self, form: str, size: int, calls: int) -> Measured:
        """Have all ranks make calls; `form` says of what."""
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # _hear says why
                process.stdin.write(json.dumps({"form": form, "size": size, "calls": calls}) + "\n")
                process.stdin.flush()
        answers = self._hear()
        medians = [statistics.median(answer["seconds"]) for answer in answers]
        cpu = sum(answer["cpu_seconds"] for answer in answers)
        return Measured(statistics.mean(medians), cpu / calls)

    def _hear(self) -> list[dict[str, Any]]:
        with pool.time_limit(self._processes, pool.SECONDS):
            lines = [answers.readline() for answers in self._answers]
        for rank, line in enumerate(lines):
            if not line:
                self._errors[rank].seek(0)
                tail = self._errors[rank].read()[-2000:].strip()
                raise pool.PeerError(f"rank {rank} ended; its output ends with:\n{tail}")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """End the processes."""
        with contextlib.suppress(BrokenPipeError):
            self._stack.close()


@contextlib.contextmanager
def launched(args: argparse.Namespace, group: Group) -> Iterator[tuple[dict, dict]]:
    """Start what runs over a group; yield the workers, and the contenders by name."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    with contextlib.ExitStack() as stack:
        workers, calls = {}, {}

        def start(name: str, python: str, script: str, *flags: str) -> None:
            workers[name] = Workers(python, script, group, cores, *flags)
            stack.callback(workers[name].close)

        if group.processes > 1 and args.peers_python:
            start("torch", args.peers_python, TORCH)
            calls[PEER] = Call("torch", "")
        start("jax", sys.executable, JAX, "plain")
        calls[PLAIN] = Call("jax", "psum")
        calls[f"{PLAIN}, operand donated"] = Call("jax", "psum donated")
        start("txcore", sys.executable, JAX, "txcore")
        calls |= {f"txcore {name}": Call("txcore", name) for name in args.algorithms.split(",")}
        yield workers, calls


def measure(args: argparse.Namespace, group: Group) -> dict[str, Any]:
    """Measure every contender at every size in rounds; return all turns."""
    turns: dict[str, dict[str, list[Measured]]] = {}
    with launched(args, group) as (workers, calls):
        size = args.min_kib << 10
        while size <= args.max_mib * MIB:
            found: dict[str, list[Measured]] = {name: [] for name in calls}
            for _ in range(args.rounds):
                for name in random.sample(list(calls), len(calls)):
                    call = calls[name]
                    turn = workers[call.worker].run(call.form, size, calls_for(size))
                    found[name].append(turn)
            turns[str(size)] = found
            print(row_of(size, found), flush=True)
            size *= args.factor
        versions = {name: each.versions for name, each in workers.items()}
    return {"versions": versions, "turns": turns}


def medians_of(found: Mapping[str, Sequence[Measured]], what: int = 0) -> dict[str, float]:
    """Return the median over the rounds of each contender: of the seconds, or of the CPU (1)."""
    return {name: statistics.median(turn[what] for turn in turns) for name, turns in found.items()}


HEADER = (
    *("size", "torch", "psum", "txcore", "by", "of torch", "of psum"),
    *("CPU: torch", "psum", "txcore"),
)


def row_of(size: int, found: Mapping[str, Sequence[Measured]]) -> str:
    """Return a size's row: bus bandwidths in GB/s, ratios within rounds, CPU in ms."""
    medians, cpu = medians_of(found), medians_of(found, 1)
    ours = [name for name in found if name.startswith("txcore ")]
    best = min(ours, key=lambda name: medians[name])

    def ratio(other: str) -> str:
        if other not in found:
            return "-"
        pairs = zip(found[other], found[best], strict=True)
        return f"{statistics.median(a.seconds / b.seconds for a, b in pairs):.2f}"

    def cell(values: Mapping[str, float], name: str, scale: float) -> str:
        return f"{values[name] * scale:.3g}" if name in values else "-"

    rate = {name: size / seconds / 1e9 for name, seconds in medians.items()}
    text = f"{size >> 20} MiB" if size >= MIB else f"{size >> 10} KiB"
    cells = [text, cell(rate, PEER, 1), cell(rate, PLAIN, 1), cell(rate, best, 1)]
    cells += [best.removeprefix("txcore "), ratio(PEER), ratio(PLAIN)]
    cells += [cell(cpu, name, 1e3) for name in (PEER, PLAIN, best)]
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table for each group, and write all of it."""
    args = parse(argv)
    results: dict[str, Any] = {
        "machine": report.describe_machine(sorted(os.sched_getaffinity(0))[:2]),
        "rounds": args.rounds,
    }
    for group in args.groups:
        print(f"\n{group}: bus bandwidth / bus factor in GB/s; CPU ms a call, all ranks\n")
        print("\n".join(report.format_markdown(HEADER, []).splitlines()))
        results[str(group)] = measure(args, group)
        report.write_json(RESULTS / f"{args.name}.json", results)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except pool.PeerError as error:
        sys.exit(f"bandwidth: {error}")
