"""What commands print: quiet where nobody reads it, one line where it cannot be written."""

import contextlib
import os
import sys
from typing import TextIO

from txcore.cli.errors import BadInput


def show(text: str = "", end: str = "\n") -> None:
    """Print on stdout, and see that it arrives.

    A reader that has gone (`| head`) is no error: the command goes on, and its exit code stays
    what it found.

    Args:
      text: what to print.
      end: what follows it.

    Raises:
      BadInput: it cannot be written, as on a full disk.
    """
    try:
        _write(sys.stdout, text + end)
    except BrokenPipeError:
        _discard(sys.stdout)
    except OSError as error:
        _discard(sys.stdout)
        raise BadInput(f"cannot write the output: {error.strerror or error}") from None


def complain(text: str) -> None:
    """Print a line on stderr; where that fails the exit code alone says it."""
    try:
        _write(sys.stderr, f"{text}\n")
    except OSError:
        _discard(sys.stderr)


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:  # closed by who started us
        return
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


def _discard(stream: TextIO) -> None:
    """Send the rest nowhere: Python itself writes what is left at its end, and complains."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
