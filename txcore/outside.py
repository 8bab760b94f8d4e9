"""Read files from outside within bounds, and make texts from outside safe to show."""

import errno
import os
import secrets
import stat
from typing import IO, Any


def printable(text: str) -> str:
    r"""Escape characters that are invisible, start a new line, or reorder the text around them.

    Args:
      text: any text, as found in a file from outside.

    Returns:
      The text with the escapes that `repr` has for such characters; the same where it has none.

    Example:
      >>> from txcore.outside import printable
      >>> print(printable("a\x1b[31m\u202eb"))
      a\x1b[31m\u202eb
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def brief(value: Any, most: int = 80) -> str:
    """Quote a value of JSON: short, and on one line.

    Example:
      >>> from txcore.outside import brief
      >>> brief("a" * 99, 12)
      "'aaaaaaaa..."
    """
    if isinstance(value, list | dict) and value:  # of which the text may be long
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = ascii(value[:most] if isinstance(value, str | bytes) else value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def first_line(error: BaseException) -> str:
    """Return an error's kind and the first line of its text.

    Example:
      >>> from txcore.outside import first_line
      >>> first_line(ValueError("of two\\nlines"))
      'ValueError: of two'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a regular file to read; never block, as opening a pipe without a writer would.

    Raises:
      OSError: it does not exist, may not be read, or is a pipe, a socket or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(mode):
            text = f"it is {_kind_error(mode)}, and no regular file"
            raise OSError(errno.EINVAL, text, path)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _kind_error(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_regular(path: str | os.PathLike[str], max_bytes: int) -> bytes | None:
    """Return the content of a regular file, or None if it is longer than `max_bytes`.

    Raises:
      OSError: as `open_regular`.
    """
    with open_regular(path) as file:
        data = file.read(max_bytes + 1)
    return data if len(data) <= max_bytes else None


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace a text file in one step, so that nobody ever reads half of it; make its folder.

    Raises:
      OSError: it cannot be written; then the old one stays as it is.
    """
    target = os.path.realpath(path)
    draft = f"{target}.{secrets.token_hex(4)}.tmp"
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(draft, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.replace(draft, target)
    finally:
        if os.path.exists(draft):
            os.remove(draft)
