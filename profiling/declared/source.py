"""Find the line of the user's own code that an op comes from."""

import functools
import os
import sysconfig
from collections.abc import Iterable

import jax

from txcore import _compat

_LIBRARIES = tuple(f"{os.sep}site-packages{os.sep}{name}{os.sep}" for name in ("jax", "txcore"))


def user_source_line(frames: Iterable[tuple[str, int]]) -> str:
    """Return "file.py:12" for the frame of `user_frame`, "" without frames."""
    chosen = user_frame(frames)
    return f"{os.path.basename(chosen[0])}:{chosen[1]}" if chosen else ""


def user_place(frames: Iterable[tuple[str, int]]) -> str:
    """Return as `user_source_line`, but the path from the working folder of what lies below it."""
    chosen = user_frame(frames)
    if chosen is None:
        return ""
    below = os.path.realpath(os.getcwd()) + os.sep
    path = os.path.realpath(chosen[0])
    name = path.removeprefix(below) if path.startswith(below) else os.path.basename(chosen[0])
    return f"{name}:{chosen[1]}"


def user_frame(frames: Iterable[tuple[str, int]]) -> tuple[str, int] | None:
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
