"""The result of an audit: its findings, and their text and HTML for people."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace

from txcore.profiling.declared.kernels import kernels_line
from txcore.profiling.report.findings import UNEXPLAINED, Findings
from txcore.profiling.report.rows import Collective
from txcore.profiling.report.verdict import write_verdict


class Report(Findings):
    """What an audit found; print it to read it. See `Findings` for its fields."""

    def allowing(self, origins: Iterable[str]) -> "Report":
        """Return the report with what nobody asked for, of some origins, let through.

        It stays in the table, and keeps the report from being exact ("not proved").

        Args:
          origins: of "partitioner", "boundary" (a reshard at a shard_map or jit edge) and
            "unknown" (cannot be read).

        Returns:
          A report in which these rows are explained; itself where there is nothing to let through.

        Raises:
          TypeError: `origins` is no set of names.
          ValueError: one of them is not unexplained in any report.

        Example:
          >>> row = Collective("all-reduce", "partitioner", (), ("data",), 2, "float32", "float32",
          ...     64, 64, 1, "train.py:40", "jit(step)/dot_general", explained=False)
          >>> report = Report((row,))
          >>> report.status, report.allowing({"partitioner"}).status
          ('failed', 'not proved')
        """
        allowed = check_allowed(origins)
        rows = tuple(
            replace(row, explained=True, origin=_blame(row)) if _blame(row) in allowed else row
            for row in self.collectives
        )
        return self if rows == self.collectives else replace(self, collectives=rows)

    def why(self) -> str:
        """Return why each collective is there that nobody asked for, and what to write instead.

        Returns:
          A few lines for each line of source and kind of operation, those that send the most first;
          "" where all is explained.
        """
        from txcore.profiling.report.why import explain_rows, write_reasons

        return "\n".join(write_reasons(explain_rows(self.collectives)))

    def to_html(self, path: str | os.PathLike[str], other: Findings | None = None) -> None:
        """Write the report as one HTML page that needs no network and no script.

        Args:
          path: the file; it is replaced whole or stays as it is.
          other: an earlier report; the page then shows what changed since.

        Raises:
          FileNotFoundError: the file's folder does not exist.
          TypeError: `other` is no report.
        """
        from txcore.profiling.report.html.page import write_html

        write_html(self, path, other)

    def _repr_html_(self) -> str:
        from txcore.profiling.report.html.notebook import frame_page
        from txcore.profiling.report.html.page import to_html

        return frame_page(to_html(self), self.verdict())

    def __str__(self) -> str:
        from txcore.profiling.report.table import (
            table_lines,
        )  # tabulate, which importing must not cost

        lines = table_lines(self.collectives)
        if self.kernels:
            lines.append(f"kernels: {kernels_line(self.kernels)}")
        if self.compiled_with is not None and self.compiled_with.changed:
            lines.append(f"compiled with {self.compiled_with}")
        if lines:  # the verdict says it again, but below a table that may be long
            lines.insert(0, self.status)
        return "\n".join([*lines, self.verdict()])

    def verdict(self) -> str:
        """Return the status and its reason in one line."""
        return write_verdict(self)


def check_allowed(origins: Iterable[str], *, known: Sequence[str] = UNEXPLAINED) -> frozenset[str]:
    """Return the origins that are to be let through, of those that would not be.

    Args:
      origins: as it is given.
      known: what may be let through; a gate refuses reshards too.

    Raises:
      TypeError, ValueError: as `Report.allowing`.
    """
    if isinstance(origins, str) or not isinstance(origins, Iterable):
        raise TypeError(
            f"allow needs a set of origins, but got {origins!r}: write allow={{'partitioner'}}"
        )
    allowed = tuple(origins)
    if unknown := [name for name in allowed if name not in known]:
        raise ValueError(
            f"allow needs origins that are refused, of {', '.join(known)}, but got "
            f"{', '.join(map(repr, unknown))}: leave it out (no other is refused)"
        )
    return frozenset(allowed)


def _blame(row: Collective) -> str:
    """Return what an unexplained row is blamed on, whatever its line says; "" for others."""
    if row.explained:
        return ""
    return row.origin if row.origin in UNEXPLAINED else "partitioner"
