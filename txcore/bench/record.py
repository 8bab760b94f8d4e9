"""Record which algorithm averages fastest, so that `tx.DP(algorithm=None)` takes it."""

import os
from collections.abc import Iterable, Sequence

import jax

from txcore.bench.measure import Row, Setup
from txcore.kernels.dispatch.tuning_file import Entry, label_candidate, read_entries, write_entries
from txcore.parallel.gradients.measured import problem_of

_ROUNDS = ("bf16_wire",)  # changes the numbers, so only who asks for it gets it


def record_fastest(
    path: str | os.PathLike[str], setup: Setup, rows: Iterable[Row], machine: str
) -> list[tuple[str, int, str]]:
    """Add to a tuning file the fastest algorithm of each size and dtype.

    Args:
      path: the file.
      setup: where the rows were measured.
      rows: means by two algorithms or more. Other collectives, wrong results and algorithms that
        round what they send are left out.
      machine: the one on which they were measured.

    Returns:
      (dtype, bytes, algorithm) of each recorded size.

    Raises:
      TuningError: the file cannot be read or written.
    """
    classes: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row.algorithm and row.algorithm not in _ROUNDS and not row.wrong:
            classes.setdefault((row.dtype, row.size_bytes), []).append(row)
    fastest = {key: found for key, found in classes.items() if len(found) > 1}
    entries = {}
    for (dtype, size), found in fastest.items():
        problem = problem_of(
            jax.default_backend(), size, dtype, setup.group_size, jax.process_count()
        )
        entries[problem.key] = _entry_of(found, machine)
    write_entries(path, {**read_entries(path), **entries})
    return [(*key, _find_best(found).algorithm) for key, found in fastest.items()]


def _find_best(rows: Sequence[Row]) -> Row:
    return min(rows, key=lambda row: row.seconds)


def _entry_of(rows: Sequence[Row], machine: str) -> Entry:
    times = {
        label_candidate("xla", {"algorithm": row.algorithm}): row.seconds * 1e6 for row in rows
    }
    config = {"algorithm": _find_best(rows).algorithm}
    return Entry("xla", config, times, jax.__version__, machine)
