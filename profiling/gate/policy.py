"""Decide which rows of a program a gate refuses, and write the error or the warning."""

import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax

from txcore import _compat
from txcore.profiling.audit import AutoShardingError
from txcore.profiling.gate.watches import Compilation
from txcore.profiling.report import Collective, Report

REFUSED = ("boundary", "partitioner", "reshard", "unknown")
_MOST_ROWS = 10


@dataclass(frozen=True)
class Refusal:
    """The watch of a gate: it refuses rows of these origins, in sorted order."""

    origins: tuple[str, ...]

    def see_program(self, program: Compilation) -> None:
        """Raise where a program has rows that are refused."""
        doing = f"compiling {program.name}, called at {program.called_at},"
        self._raise_if_refused(program.report, doing)
        if untraced := _describe_untraced(program, self.origins):
            raise _make_error(program.report, untraced)

    def see_move(self, row: Callable[[], Collective | None]) -> None:
        """Raise where moving an array is refused."""
        if (found := row()) is not None:
            self._raise_if_refused(Report((found,), checked=False), "jax.device_put")

    def _raise_if_refused(self, report: Report, doing: str) -> None:
        if rows := _rows_of(report, self.origins):
            what = "\n".join([f"{doing} adds {len(rows)}:", *_list_rows(rows)])
            raise _make_error(report, _describe_refusal(what, rows))


@dataclass(frozen=True)
class Collection:
    """The watch of a gate that only warns: it keeps what another would refuse."""

    origins: tuple[str, ...]

    def see_program(self, program: Compilation) -> None:
        """Keep the rows of a program that would be refused."""
        doing = f"compiling {program.name}, called at {program.called_at},"
        if rows := _rows_of(program.report, self.origins):
            _keep(doing, rows)
        elif untraced := _describe_untraced(program, self.origins):
            _keep(untraced, ())

    def see_move(self, row: Callable[[], Collective | None]) -> None:
        """Keep a move that would be refused."""
        if (found := row()) is not None and found.origin in self.origins:
            _keep("jax.device_put", (found,))


_Offence = tuple[str, tuple[Collective, ...]]
_thread = threading.local()  # the offences of this thread's outermost collecting block


def _keep(doing: str, rows: tuple[Collective, ...]) -> None:
    _thread.offences[doing, rows] = _thread.offences.get((doing, rows), 0) + 1


def begin_collecting() -> bool:
    """Begin to keep offences in this thread; False inside of a block that does already."""
    if getattr(_thread, "offences", None) is not None:
        return False
    _thread.offences = {}
    return True


def warn_of_collected(stacklevel: int) -> None:
    """Warn once of all that was kept, and forget it."""
    offences: dict[_Offence, int] = _thread.offences
    _thread.offences = None
    if not offences:
        return
    lines = []
    for (doing, rows), times in offences.items():
        often = "" if times == 1 else f" ({times} times)"
        lines += [f"{doing} adds {len(rows)}{often}:", *_list_rows(rows)] if rows else [doing]
    every = tuple(row for _, rows in offences for row in rows)
    warnings.warn(_describe_refusal("\n".join(lines), every), stacklevel=stacklevel)


def _rows_of(report: Report, origins: Iterable[str]) -> tuple[Collective, ...]:
    return tuple(row for row in report.collectives if _origin_of_row(row) in origins)


def _describe_untraced(program: Compilation, origins: Iterable[str]) -> str:
    """Describe why the author's collectives cannot be told from the partitioner's, or nothing."""
    report = program.report
    is_told = report.checked or not report.collectives or _compat.marks_partitioner()
    if is_told or "partitioner" not in origins:
        return ""
    return (
        f"no_auto_collectives needs the traced program of {program.name} to tell its author's "
        f"collectives from the partitioner's, which jax {jax.__version__} does not mark, but "
        "it was lowered outside of the block: lower it inside"
    )


def _make_error(report: Report, text: str) -> AutoShardingError:
    error = AutoShardingError(report)
    error.args = (text,)
    return error


def _origin_of_row(row: Collective) -> str:
    """Return a row's origin; an unexplained row is the partitioner's, whatever its line says."""
    return row.origin if row.explained or row.origin in REFUSED else "partitioner"


def _list_rows(rows: tuple[Collective, ...]) -> list[str]:
    from txcore.profiling.report.table import table_lines  # tabulate, which importing must not cost

    more = [f"  and {len(rows) - _MOST_ROWS} more"] if len(rows) > _MOST_ROWS else []
    named = [f"  {row.op or row.kind}: {row.op_name or row.note}" for row in rows[:_MOST_ROWS]]
    return [*table_lines(rows[:_MOST_ROWS]), *named, *more]


def _describe_refusal(what: str, rows: tuple[Collective, ...]) -> str:
    origins = sorted({_origin_of_row(row) for row in rows})
    return (
        f"no_auto_collectives required that nobody communicates unasked, but {what}\n"
        "write the communication out (jax.shard_map with txcore's collectives), give the "
        "arguments and results the shardings that the program wants, or let it through: "
        f"no_auto_collectives(allow={{{', '.join(map(repr, origins))}}})"
    )
