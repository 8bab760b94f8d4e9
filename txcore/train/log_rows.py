"""A file of rows that outlives its runs: appended at once, no step twice, nothing thrown away."""

import logging
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_LOG = logging.getLogger("txcore")


class RowFile:
    """Append a line for each record; where a run goes on, first take out what it makes again.

    A run that was killed has logged steps after its last checkpoint, which the next one makes
    again. Those rows are moved to a file beside, with ".old" at the end of its name; so is a row
    that is not whole.

    Args:
      path: the file, "~" for the home; its folder is made if it is missing.
      read_key: returns the step and the kind of a row; a ValueError says that it is no such row.
      check_head: refuses a first line that is not the log's, with a ValueError; None where the
        first line is a row.
    """

    def __init__(
        self,
        path: str | Path,
        read_key: Callable[[bytes], tuple[int, str]],
        *,
        check_head: Callable[[bytes], object] | None = None,
    ) -> None:
        from txcore.train.checkpoints.folder import absolute_path  # most runs write no such file

        self.path = absolute_path(path)
        self.head = b""
        self._read_key, self._check_head = read_key, check_head
        self._step: int | None = None  # of the newest row
        self._kinds: set[str] = set()  # of the rows of that step
        self._failed = False

    def takes(self, kind: str, step: int, *, begun: int) -> bool:
        """Tell whether a record is to be appended; make the file ready for it.

        Args:
          kind: of the record.
          step: the completed steps when it was made.
          begun: those when its `fit` began.
        """
        again = step == self._step and kind == "step" and "step" in self._kinds
        if self._step is None or step < self._step or again:
            limit = step if self._failed else begun
            self._kinds = self._cut_after(limit)
            self._step, self._failed = limit, False
        return step != self._step or kind not in self._kinds

    def append(self, kind: str, step: int, line: str) -> None:
        """Append the line of a record that `takes` let through; hand it to the system at once."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(line.encode())
        except OSError:  # of a full disk, which may have written a part
            self._step, self._failed = None, True
            raise
        if step != self._step:
            self._step, self._kinds = step, set()
        self._kinds.add(kind)

    def _cut_after(self, limit: int) -> set[str]:
        """Move the rows after a step out of the file; return the kinds of the rows of that step."""
        self.head = b""
        if not self.path.exists() or not self.path.stat().st_size:
            return set()
        with (
            self.path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
        ):
            first = 0 if self._check_head is None else text.find(b"\n") + 1
            if self._check_head is not None:
                self._check_head(text[:first])
            self.head = text[:first]
            whole = keep = text.rfind(b"\n") + 1
            kinds: set[str] = set()
            place = whole
            while place > first:
                start = text.rfind(b"\n", 0, place - 1) + 1
                step, kind = self._read(text[start:place])
                if step < limit:
                    break
                keep = start if step > limit else keep
                kinds |= {kind} if step == limit else set()
                place = start
            if keep < len(text):
                self._move_tail(file, keep, is_row=keep < whole, limit=limit)
        return kinds

    def _read(self, row: bytes) -> tuple[int, str]:
        try:
            return self._read_key(row)
        except (ValueError, LookupError, TypeError):
            raise ValueError(
                f"a log that goes on needs rows of its own, got {row[:60]!r} in {self.path}: give "
                "another path"
            ) from None

    def _move_tail(self, file: BinaryIO, start: int, *, is_row: bool, limit: int) -> None:
        old = self.path.with_name(f"{self.path.name}.old")
        with old.open("ab") as kept:
            kept.write(self.head)
            file.seek(start)
            shutil.copyfileobj(file, kept)
        os.truncate(self.path, start)
        if is_row:
            _LOG.warning(
                "txcore: %s had rows of later steps than %d, after which this run goes on: they "
                "are in %s now",
                *(self.path, limit, old.name),
            )

    def add_to_head(self, head: bytes, fields: bytes) -> None:
        """Write the file anew with another first line, and more at the end of each row."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(f"{self.path.name}.new")
        with fresh.open("wb") as new:
            new.write(head)
            if self.head:
                with self.path.open("rb") as file:
                    file.seek(len(self.head))
                    new.writelines(line.rstrip(b"\n") + fields + b"\n" for line in file)
        os.replace(fresh, self.path)
        self.head = head
