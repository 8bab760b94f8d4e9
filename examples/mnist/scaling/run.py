"""Start the ranks of a case on cores of their own, and read what rank 0 has written."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from scaling.cases import Case

HERE = pathlib.Path(__file__).resolve().parent
_TAIL = 2000  # characters of a failed run's output that are shown


def usable_cores() -> list[int]:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def can_pin() -> bool:
    """Tell whether this system pins processes to cores."""
    return hasattr(os, "sched_setaffinity")


@contextlib.contextmanager
def pin_to(cores: Sequence[int]) -> Iterator[None]:
    """Pin this thread, and what it starts: libraries count their cores when imported."""
    if not can_pin():
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def run_case(
    case: Case, options: dict[str, Any], cores: Sequence[int], folder: pathlib.Path
) -> Any:
    """Run a case to its end, and return its results.

    Args:
      case: which.
      options: model, data, epochs, seed and so on, the same for all cases.
      cores: those that may be used; the case takes the first ones.
      folder: for the files that are exchanged.

    Returns:
      What the worker's rank 0 measured, with the case and its cores.

    Raises:
      RuntimeError: a rank failed; the end of its output is in the text.
    """
    taken = list(cores)[: case.workers * case.cores_per_worker]
    out = folder / "run.json"
    out.unlink(missing_ok=True)
    asked = json.dumps({**options, **case.to_dict(), "out": str(out)})
    command = [sys.executable, str(HERE / "worker.py"), asked]
    if case.way == "processes" and case.workers > 1:
        launcher = [sys.executable, "-m", "txcore", "launch", "-n", str(case.workers), "--"]
        command = [*launcher, *command]
    threads = case.cores_per_worker if case.way == "processes" else len(taken)
    _run(command, taken, threads, case.name)
    return {
        **case.to_dict(),
        "cores": taken,
        "oversubscribed": case.workers * case.cores_per_worker > len(cores),
        **json.loads(out.read_text(encoding="utf-8")),
    }


def _run(command: Sequence[str], cores: Sequence[int], threads: int, name: str) -> None:
    with pin_to(cores):
        done = subprocess.run(
            command,
            env=environment() | {"OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    if done.returncode:
        raise RuntimeError(f"{name} ended with exit code {done.returncode}: {done.stdout[-_TAIL:]}")


def environment() -> dict[str, str]:
    """Return the variables of what is started: no devices but those that a case asks for."""
    # Kept programs would be compiled in no time, all but the first run's.
    left_out = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "TXCORE_CACHE")
    own = {name: value for name, value in os.environ.items() if name not in left_out}
    own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), own.get("PYTHONPATH")]))
    return own | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
