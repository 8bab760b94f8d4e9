"""The runs of an experiment: one serial, then the same work by more workers, and more work."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

WAYS = ("processes", "devices")


@dataclasses.dataclass(frozen=True)
class Case:
    """One training run.

    Attributes:
      name: as it is reported.
      group: "serial", "strong", "weak" (a batch for each worker) or "again".
      way: what there are several of: "processes" of one device, or "devices" of one process.
      workers: how many.
      batch_size: of the global batch.
      cores_per_worker: of each, as far as there are so many.
      rate_scaling: "linear" multiplies the learning rate as the batch was; else "none".
      prefetch: batches that are read ahead.
      bare_batches: batch sizes at which bare steps are timed besides.
      trains: whether it trains at all, and does not only time bare steps.
    """

    name: str
    group: str
    way: str
    workers: int
    batch_size: int
    cores_per_worker: int
    rate_scaling: str = "none"
    prefetch: int = 2
    bare_batches: tuple[int, ...] = ()
    trains: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return the case as the worker reads it."""
        return dataclasses.asdict(self)


def cores_of_a_worker(counts: Sequence[int], cores: int) -> int:
    """Return how many cores every worker gets in all runs, so that speedups are by workers.

    Example:
      >>> cores_of_a_worker([1, 2, 4], 16), cores_of_a_worker([1, 2, 4], 2)
      (4, 1)
    """
    return max(1, cores // max(counts))


def list_cases(
    counts: Sequence[int], batch_size: int, cores: int, carried: Sequence[int]
) -> list[Case]:
    """Return the runs of an experiment, in the order in which they are made.

    Args:
      counts: numbers of workers; 1 is the serial run, which is always there.
      batch_size: of the serial run and of strong scaling; of each worker in weak scaling.
      cores: how many this process may use.
      carried: numbers of ranks to which the expected speedup is carried.

    Example:
      >>> [case.name for case in list_cases([1, 2], 128, 4, [])][:4]
      ['serial', 'serial, all cores', 'serial, prefetch 0', '2 processes']
    """
    own = cores_of_a_worker(counts, cores)
    parts = [batch_size // n for n in {*counts, *carried} if not batch_size % n]
    one = Case("serial", "serial", "processes", 1, batch_size, own)
    cases = [dataclasses.replace(one, bare_batches=tuple(sorted({*parts} - {batch_size})))]
    if cores > own:
        cases.append(dataclasses.replace(one, name="serial, all cores", cores_per_worker=cores))
    cases.append(dataclasses.replace(one, name="serial, prefetch 0", prefetch=0))
    for n in sorted({*counts} - {1}):
        cases += _list_parallel(one, n)
    again = dataclasses.replace(one, name="serial, again", group="again", trains=False)
    return [*cases, again]


def _list_parallel(one: Case, n: int) -> Iterator[Case]:
    for way in WAYS:
        many = dataclasses.replace(one, way=way, workers=n)
        if not one.batch_size % n:
            yield dataclasses.replace(many, name=f"{n} {way}", group="strong")
        weak = dataclasses.replace(many, group="weak", batch_size=n * one.batch_size)
        yield dataclasses.replace(weak, name=f"{n} {way}, batch x {n}")
        if way == "processes":
            name = f"{n} {way}, batch and rate x {n}"
            yield dataclasses.replace(weak, name=name, rate_scaling="linear")
