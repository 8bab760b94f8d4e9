"""What the programs of the corpus have in common.

A program is data: `build(mesh)` returns a function and its arguments as shapes with shardings, so
that it compiles for simulated CPU devices as well as for machines that are not there. The lines
at which an audit has to point are marked in its source.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

HERE = "# <-- here"
Build = Callable[[Mesh], tuple[Callable[..., Any], tuple[Any, ...]]]
VERSION = f"{jax.__version_info__[0]}.{jax.__version_info__[1]}"


@dataclass(frozen=True)
class Program:
    """A program, and the axes of the mesh that it wants.

    limits: why its class and line cannot be told, by where: a jax version ("0.10"), a platform
      ("tpu") or "gate". That something was added can be told everywhere.
    platforms: those that jax lowers it for.
    """

    build: Build
    axes: Mapping[str, int]
    limits: Mapping[str, str] = field(default_factory=dict)
    platforms: tuple[str, ...] = ("cpu", "tpu", "cuda")

    def span(self) -> dict[str, str]:
        """Return the program's source by its lines as an audit names them, "file.py:12"."""
        lines, first = inspect.getsourcelines(self.build)
        file = Path(self.build.__code__.co_filename).name
        return {f"{file}:{first + i}": line for i, line in enumerate(lines)}

    def marked(self) -> set[str]:
        """Return the lines that an audit has to name."""
        return {place for place, line in self.span().items() if HERE in line}

    def limit(self, where: str) -> str:
        """Return why class and line cannot be told there with this jax, "" where they can."""
        return self.limits.get(where, "") or self.limits.get(VERSION, "")
