"""The result of an audit: its findings, and their text and HTML for people."""

import os

from txcore.profiling.declared.kernels import kernels_line
from txcore.profiling.report.findings import Findings
from txcore.profiling.report.verdict import write_verdict


class Report(Findings):
    """What an audit found; print it to read it. See `Findings` for its fields."""

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
