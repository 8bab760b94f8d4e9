"""Print the output of commands: a closed pipe is no error, a full disk is one."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from txcore.cli.errors import BadInput, first_line


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], *others: type[Exception]) -> Iterator[None]:
    """Name the file or folder that cannot be written, in one line.

    Args:
      path: what is written in the block.
      *others: errors of what is written there, besides the system's.

    Raises:
      BadInput: it cannot be written.
    """
    reported: tuple[type[Exception], ...] = (OSError, *others)
    try:
        yield
    except reported as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise BadInput(f"cannot write {os.fspath(path)}: {reason}") from None


def show(text: str = "", end: str = "\n") -> None:
    """Print on stdout, and check that it was written.

    If the reader has gone (`| head`), the command goes on, and keeps its exit code.

    Args:
      text: the text to print.
      end: the text after it.

    Raises:
      BadInput: it cannot be written, as on a full disk.
    """
    try:
        _write_text(sys.stdout, text + end)
    except BrokenPipeError:
        _discard_rest(sys.stdout)
    except OSError as error:
        _discard_rest(sys.stdout)
        raise BadInput(f"cannot write the output: {error.strerror or error}") from None


def show_once(text: str) -> None:
    """Print on stdout of rank 0 alone."""
    import jax

    if jax.process_index() == 0:
        show(text)


def complain(text: str) -> None:
    """Print a line on stderr; if that fails, the exit code alone reports the error."""
    try:
        _write_text(sys.stderr, f"{text}\n")
    except OSError:
        _discard_rest(sys.stderr)


def _write_text(stream: TextIO | None, text: str) -> None:
    if stream is None:  # closed by the parent process
        return
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


def _discard_rest(stream: TextIO) -> None:
    """Discard what a stream still holds: Python would fail to write it at exit."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
