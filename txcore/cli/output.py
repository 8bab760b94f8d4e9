"""Print what commands show: without an error if nobody reads it, with one on a full disk."""

import contextlib
import os
import sys
from typing import TextIO

from txcore.cli.errors import BadInput


def show(text: str = "", end: str = "\n") -> None:
    """Print on stdout, and check that it was written.

    A reader that has gone (`| head`) is no error: the command goes on, and keeps its exit code.

    Args:
      text: what to print.
      end: what follows it.

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


def complain(text: str) -> None:
    """Print a line on stderr; if that fails, only the exit code reports the error."""
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
    """Discard what is left in a stream, which Python would write at its end and fail."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
