"""Errors of the command line: one line each, with the line of the user's code if there is one."""

import argparse
import os
import pathlib
import sys
import sysconfig
import traceback
from collections.abc import Iterator

from txcore.errors import TxcoreError
from txcore.outside import first_line as first_line


class BadInput(TxcoreError):
    """The input cannot be used; the text is the one line that the user sees."""


class BadUsage(BadInput):
    """The arguments do not fit together; the line names the command's --help, too.

    Attributes:
      parser: that of the command; None if the options name it.
    """

    parser: argparse.ArgumentParser | None = None


def blame_user_line(error: BaseException) -> str:
    """Return the first line of an error in the user's code, and where it was raised.

    Example:
      >>> from txcore.cli.errors import blame_user_line
      >>> blame_user_line(KeyError("lr"))
      "KeyError: 'lr' (--traceback shows all)"
    """
    place = user_line(error)
    where = f"{place}; " if place else ""
    return f"{first_line(error)} ({where}--traceback shows all)"


def user_line(error: BaseException) -> str | None:
    """Return "file.py:12", the user's innermost line in an error's traceback, if there is one.

    Lines of installed packages count if there is no other: a user's package may be installed.
    """
    own = _own_folders()
    places = [place for place in _walk_places(error) if not place[0].startswith(own)]
    places = [place for place in places if not _is_pythons(place[0])]
    theirs = [place for place in places if not _is_installed(place[0])]
    if not places:
        return None
    path, line = (theirs or places)[-1]
    return f"{_shorten_path(path)}:{line}"


def _walk_places(error: BaseException) -> Iterator[tuple[str, int]]:
    """Yield file and line of each frame, outermost first, and those of a syntax error."""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if not frame.f_code.co_filename.startswith("<"):
            yield os.path.realpath(frame.f_code.co_filename), line
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        yield os.path.realpath(error.filename), error.lineno


def _own_folders() -> tuple[str, ...]:
    """Return the folders of txcore and jax."""
    folders = [str(pathlib.Path(__file__).parents[1])]
    for name in ("txcore.kernels", "txcore.profiling", "jax", "jaxlib"):
        folders += [*getattr(sys.modules.get(name), "__path__", ())]
    return (*(f"{os.path.realpath(folder)}{os.sep}" for folder in folders),)


def _is_installed(path: str) -> bool:
    return f"-packages{os.sep}" in path  # site-packages, or Debian's dist-packages


def _is_pythons(path: str) -> bool:
    """Tell whether a file belongs to Python's standard library."""
    library = os.path.realpath(sysconfig.get_paths()["stdlib"])
    return path.startswith(f"{library}{os.sep}") and not _is_installed(path)


def _shorten_path(path: str) -> str:
    """Return a path relative to the current folder if it lies below it."""
    here = os.path.realpath(os.getcwd()) + os.sep
    return path.removeprefix(here)
