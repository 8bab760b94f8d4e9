"""Find the line of the user's own code that an op comes from."""

import functools
import os
from collections.abc import Iterable

import jax

from txcore import _compat

_LIBRARIES = tuple(f"{os.sep}site-packages{os.sep}{name}{os.sep}" for name in ("jax", "txcore"))


def user_source_line(frames: Iterable[tuple[str, int]]) -> str:
    """Return "file.py:12" for the innermost frame outside jax and txcore, "" without frames."""
    frames = tuple(frames)
    chosen = next((f for f in frames if not _is_library(f[0])), frames[0] if frames else None)
    return f"{os.path.basename(chosen[0])}:{chosen[1]}" if chosen else ""


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
