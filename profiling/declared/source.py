"""Find the line of the user's own code that an op comes from."""

import functools
import os
import re
import sys
import sysconfig
from collections.abc import Iterable

import jax

from txcore import _compat

_OLD_CELL = re.compile(r"<ipython-input-(\d+)-")  # as terminals have it
Frame = tuple[str, int]  # a file and the number of a line
_LIBRARIES = tuple(f"{os.sep}site-packages{os.sep}{name}{os.sep}" for name in ("jax", "txcore"))


def user_source_line(frames: Iterable[Frame]) -> str:
    """Return "file.py:12" for the frame of `user_frame`, "" without frames."""
    return short_line(user_frame(frames))


def short_line(frame: Frame | None) -> str:
    """Return "file.py:12" of a frame, "In [3]:12" in a notebook, "" without one."""
    return f"{_cell_of(frame[0]) or os.path.basename(frame[0])}:{frame[1]}" if frame else ""


def _cell_of(file: str) -> str:
    """Return "In [3]" of the name that IPython gives a cell's code; "" of files."""
    if named := _OLD_CELL.match(file):
        return f"In [{named[1]}]"
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    names = getattr(getattr(shell, "compile", None), "_filename_map", None) or {}
    return f"In [{names[file]}]" if file in names else ""


def whole_line(frame: Frame | None) -> str:
    """Return as `short_line` with the file's whole path."""
    return f"{frame[0]}:{frame[1]}" if frame else ""


def user_place(frames: Iterable[Frame]) -> str:
    """Return as `user_source_line`, but the path from the working folder of what lies below it."""
    return near_line(whole_line(user_frame(frames)))


def near_line(place: str) -> str:
    """Return a whole line with the path from the working folder, or else the file's name.

    Example:
      >>> near_line(f"{os.getcwd()}/examples/train.py:12"), near_line("/elsewhere/train.py:3")
      ('examples/train.py:12', 'train.py:3')
    """
    file, _, line = place.rpartition(":")
    if not file:
        return place
    if cell := _cell_of(file):
        return f"{cell}:{line}"
    below, path = os.path.realpath(os.getcwd()) + os.sep, os.path.realpath(file)
    name = path.removeprefix(below) if path.startswith(below) else os.path.basename(file)
    return f"{name}:{line}"


def user_frame(frames: Iterable[Frame]) -> Frame | None:
    """Return the innermost frame (file, line) of the user's own code.

    Of installed packages and Python itself there may be lines below the user's; they count where
    there is no other, and those of jax and txcore where there is no line of anyone else.
    """
    frames = tuple(frames)
    others = [frame for frame in frames if not _is_library(frame[0])]
    theirs = (frame for frame in others if not _is_installed(frame[0]))
    return next(theirs, None) or next(iter(others or frames), None)


@functools.lru_cache(maxsize=4096)
def _is_installed(file: str) -> bool:
    """Tell whether a file is of an installed package, of Python, or none at all ("<frozen x>")."""
    if file.startswith("<frozen"):
        return True
    packages = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
    library = sysconfig.get_paths()["stdlib"] + os.sep
    return any(name in file for name in packages) or file.startswith(library)


@functools.cache
def _library_roots() -> tuple[str, ...]:
    # The folders of kernels and profiling are links: frames show where they lead.
    home = os.path.dirname(os.path.dirname(str(_compat.__file__)))
    folders = (home, os.path.dirname(jax.__file__))
    linked = (os.path.join(home, name) for name in ("kernels", "profiling"))
    return tuple(os.path.realpath(folder) + os.sep for folder in (*folders, *linked))


@functools.lru_cache(maxsize=4096)
def _is_library(file: str) -> bool:
    return any(library in file for library in _LIBRARIES) or file.startswith(_library_roots())
