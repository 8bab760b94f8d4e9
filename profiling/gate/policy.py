"""Decide which rows of a program a gate refuses, and write the error."""

import functools
from typing import Any

import jax

from txcore import _compat
from txcore.profiling.audit import AutoShardingError
from txcore.profiling.report import Collective, Report

REFUSED = ("boundary", "partitioner", "reshard", "unknown")
_MOST_ROWS = 10


@functools.cache
def gate_context() -> Any:
    """Return jax's context that holds this thread's refused origins: part of all jax's keys."""
    # The first gate makes it, not the import: a new context makes jax trace everything once more.
    return jax.make_user_context(())


def refused_origins() -> tuple[str, ...]:
    """Return the origins that the blocks of this thread refuse, () outside of any."""
    return gate_context().value


def raise_if_refused(report: Report, doing: str) -> None:
    """Raise where a report has rows whose origin this thread's blocks refuse."""
    rows = tuple(row for row in report.collectives if _origin_of_row(row) in refused_origins())
    if rows:
        raise _make_error(report, _describe_refusal(rows, doing))


def raise_if_untraced(report: Report, name: str) -> None:
    """Raise where the author's collectives cannot be told from the partitioner's."""
    if report.checked or not report.collectives or _compat.marks_partitioner():
        return
    if "partitioner" in refused_origins():
        raise _make_error(
            report,
            f"no_auto_collectives needs the traced program of {name} to tell its author's "
            f"collectives from the partitioner's, which jax {jax.__version__} does not mark, but "
            "it was lowered outside of the block: lower it inside",
        )


def _make_error(report: Report, text: str) -> AutoShardingError:
    error = AutoShardingError(report)
    error.args = (text,)
    return error


def _origin_of_row(row: Collective) -> str:
    """Return a row's origin; an unexplained row is the partitioner's, whatever its line says."""
    return row.origin if row.explained or row.origin in REFUSED else "partitioner"


def _describe_refusal(rows: tuple[Collective, ...], doing: str) -> str:
    from txcore.profiling.report.table import table_lines  # tabulate, which importing must not cost

    more = [f"  and {len(rows) - _MOST_ROWS} more"] if len(rows) > _MOST_ROWS else []
    named = [f"  {row.op or row.kind}: {row.op_name or row.note}" for row in rows[:_MOST_ROWS]]
    origins = sorted({_origin_of_row(row) for row in rows})
    return "\n".join(
        [
            f"no_auto_collectives required that nobody communicates unasked, but {doing} adds "
            f"{len(rows)}:",
            *table_lines(rows[:_MOST_ROWS]),
            *named,
            *more,
            "write the communication out (jax.shard_map with txcore's collectives), give the "
            "arguments and results the shardings that the program wants, or let it through: "
            f"no_auto_collectives(allow={{{', '.join(map(repr, origins))}}})",
        ]
    )
