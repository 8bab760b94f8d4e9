"""The content of a lock: a program's declared collectives, by their purpose.

The entries come from the traced program, not from the compiled ops: versions of jax combine,
split, promote, hoist, fold and deduplicate in different ways, but agree on what the program asks
for. A report that is ok proves that the compiled program sends no more than that. The budgets bound
the compiled ops themselves, in bytes on the wire.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from txcore.errors import TxcoreError
from txcore.profiling.declared.collectives import Declared
from txcore.profiling.lock.proof import Proof
from txcore.profiling.report import Collective, Report


class LockError(TxcoreError, ValueError):
    """A lock file, or a report to be locked, cannot be used; its text is one line."""


@dataclass(frozen=True)
class Entry:
    """What a program sends for one purpose, in one call.

    Attributes:
      tag: txcore's tag, or "" where there is none: then the source names it.
      source: the file without its line, which every edit would change; "" with a tag.
      kind: HLO's name ("all-reduce").
      axes: mesh axes of more than one device, in the mesh's order.
      dtype: as declared.
      origin: as `Collective.origin`.
      payload_bytes: S (nccl-tests') times executions, in the declared dtype.
      trips: executions of the array that is sent most often.
      trips_known: False in a loop of unknown length: then both numbers are the least.
      places: "file.py:12" of each, for printing; not in the file.
    """

    tag: str
    source: str
    kind: str
    axes: tuple[str, ...]
    dtype: str
    origin: str
    payload_bytes: int
    trips: int
    trips_known: bool = True
    places: tuple[str, ...] = field(default=(), compare=False)

    @property
    def key(self) -> tuple[str, str, str, tuple[str, ...], str, str]:
        """Return what makes two entries the same one, in the order of the file."""
        return self.tag, self.source, self.kind, self.axes, self.dtype, self.origin


@dataclass(frozen=True)
class Lock:
    """What one program may send on one target.

    Attributes:
      target: what it was compiled for and its mesh: "cpu:8 data=4,model=2".
      entries: sorted by their keys, each key once.
      budgets: bytes on the wire that each device may send in one call, by mesh axis.
      compiled_with: XLA options and jax's settings that differ from the defaults, by name.
      allow: the origins of what nobody asked for that are let through: its rows are entries.
      proofs: what the program was, for each version of jax with which that was kept.
    """

    target: str
    entries: tuple[Entry, ...]
    budgets: Mapping[str, int] = field(default_factory=dict)
    compiled_with: Mapping[str, str] = field(default_factory=dict)
    allow: tuple[str, ...] = ()
    proofs: tuple[Proof, ...] = ()


def lock_of(report: Report) -> Lock:
    """Return a program's communication in terms that every version of jax agrees on.

    Args:
      report: of `audit`; it has to be ok.

    Returns:
      Its lock, without budgets and without collectives that send nothing: those in groups of one
      device, and those whose result nothing uses.

    Raises:
      LockError: the report is not ok, or was not compared with a traced program.

    Example:
      >>> import jax
      >>> from txcore.profiling import audit
      >>> mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> spec = jax.sharding.PartitionSpec
      >>> total = jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh,
      ...     in_specs=spec("data"), out_specs=spec())
      >>> lock = lock_of(audit(total, jax.numpy.ones(8)))
      >>> [(entry.kind, entry.axes, entry.payload_bytes) for entry in lock.entries]
      [('all-reduce', ('data',), 16)]
    """
    if not report.ok:
        raise LockError(f"a lock needs a program whose audit has not failed: {report.verdict()}")
    if not report.checked:
        raise LockError(
            "a lock needs a report that was compared with its traced program, but this one is of "
            "compiled code alone: audit the function with its arguments"
        )
    declared = [fate.declared for fate in report.fates]
    sent = [_entry_of_declared(d, report) for d in declared if d.live and d.group_size > 1]
    matched = {place for fate in report.fates for place in fate.rows}
    rows = enumerate(report.collectives)
    sent += [_entry_of_row(row) for place, row in rows if place not in matched]
    used = report.compiled_with.changed if report.compiled_with else {}
    return Lock(target_of(report), _sum_by_key(sent), compiled_with=used)


def target_of(report: Report) -> str:
    """Name a report's target and mesh."""
    mesh = ",".join(f"{name}={size}" for name, size in report.mesh)
    return " ".join(part for part in (report.target, mesh) if part)


def _entry_of_declared(declared: Declared, report: Report) -> Entry:
    sizes = dict(report.mesh)
    order = list(sizes)
    axes = [axis for axis in declared.axes if sizes.get(axis) != 1]
    axes.sort(key=lambda axis: order.index(axis) if axis in order else len(order))
    return Entry(
        tag=declared.tag or "",
        source="" if declared.tag else _file_of_source(declared.source),
        kind=declared.kind,
        axes=tuple(axes),
        dtype=declared.dtype,
        origin=_origin_of_declared(declared),
        payload_bytes=declared.payload_bytes * declared.trips,
        trips=declared.trips,
        trips_known=declared.trips_known,
        places=(declared.source,) if declared.source else (),
    )


def _origin_of_declared(declared: Declared) -> str:
    if declared.tag:
        return "txcore"
    if declared.primitive == "reshard":
        return "reshard"
    return "autodiff" if declared.autodiff else "user"


def _entry_of_row(row: Collective) -> Entry:
    """Return the entry of a row that is explained without a declaration, as opaque calls are."""
    tag = ",".join(row.tags)
    return Entry(
        tag=tag,
        source="" if tag else _file_of_source(row.source),
        kind=row.kind,
        axes=row.axes,
        dtype=row.dtype,
        origin=row.origin,
        payload_bytes=row.payload_bytes * row.trips,
        trips=row.trips,
        trips_known=row.trips_known,
        places=(row.source,) if row.source else (),
    )


def _file_of_source(source: str) -> str:
    return source.rpartition(":")[0]


def _sum_by_key(sent: Iterable[Entry]) -> tuple[Entry, ...]:
    same: dict[object, list[Entry]] = defaultdict(list)
    for entry in sent:
        same[entry.key].append(entry)
    summed = [
        replace(
            entries[0],
            payload_bytes=sum(e.payload_bytes for e in entries),
            trips=max(e.trips for e in entries),
            trips_known=all(e.trips_known for e in entries),
            places=tuple(dict.fromkeys(place for e in entries for place in e.places)),
        )
        for entries in same.values()
    ]
    return tuple(sorted(summed, key=lambda entry: entry.key))
