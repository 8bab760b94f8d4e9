"""Public programs: what jax's documentation teaches, and what people reported, with its verdict.

Each was judged by hand from what it says, before an audit saw it:

- "proved": all that is sent is written: a collective, a reshard, or an `out_sharding` that asks
  for a sum
- "not proved": autodiff makes some of it, or a part cannot be seen
- "failed": something is sent that nobody wrote; the lines that need it are marked
- `AS_COMPILED`: nothing is written, so that it is "failed" if the compiled text has a collective,
  and "proved" if it has none

Each is written anew, in the style of its source, on eight devices.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from corpus.corpus_moves import Moves
from corpus.corpus_programs import Program
from jax.sharding import AxisType, Mesh

AS_COMPILED = "as compiled"
SUM = "sum"  # the compiler chooses an all-reduce or a reduce-scatter


@dataclass(frozen=True)
class Public(Program):
    """A public program.

    Attributes:
      status: the verdict.
      moves: what was asked for: kind (or `SUM`), axes, bytes in one call. None where the compiler
        chooses what it takes.
      explicit: whether the mesh's axes are of type Explicit.
      source: a page of jax's documentation ("201/sharding"), or a repository and an issue's number.
    """

    status: str = "proved"
    moves: tuple[Moves, ...] | None = ()
    explicit: bool = False
    source: str = ""

    def mesh_of(self, devices: Any) -> Mesh:
        sizes = tuple(self.axes.values())
        kind = AxisType.Explicit if self.explicit else AxisType.Auto
        return Mesh(devices.reshape(sizes), tuple(self.axes), axis_types=(kind,) * len(sizes))


PUBLIC: dict[str, Public] = {}
LINE, GRID = {"X": 8}, {"X": 4, "Y": 2}


def public(
    source: str, status: str = "proved", *moves: Moves | None, axes: Mapping[str, int] = LINE,
    explicit: bool = False, **more: Any,
):  # fmt: skip
    """Register a program; `None` for its moves says that the compiler chooses them."""
    chosen = None if None in moves else moves

    def register(build):
        PUBLIC[build.__name__] = Public(
            build, axes, status=status, moves=chosen, explicit=explicit, source=source,
            **more,
        )  # fmt: skip
        return build

    return register


def asked(payload: int, *axes: str, trips: int = 1) -> Moves:
    """A sum over axes that a reshard or an out_sharding asks for."""
    return Moves(SUM, axes, "float32", payload, trips)
