"""A cell of the matrix: a collective, a dtype, a mesh and check_vma; its inputs and its truth.

The truth is the oracle in float64 (int64 for integers, which wrap around as the devices' do), and
of the derivatives the oracle's Jacobian, column by column: nothing of it is txcore's.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from cases import Case, as_tuple, world
from jax.sharding import AxisType, Mesh

DTYPES = ("float32", "float64", "bfloat16", "float16", "int8", "int32", "bool")
ROWS = 3  # that vmap and scan go over
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """A mesh, the axis argument, and of which type the mesh's axes are."""

    shape: tuple[tuple[str, int], ...]
    axis: str | tuple[str, ...]
    explicit: bool = False

    def __str__(self) -> str:
        shape = "x".join(f"{name}{size}" for name, size in self.shape)
        return f"{shape}-over-{'+'.join(self.axes)}{'-explicit' * self.explicit}"

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.shape)

    @property
    def axes(self) -> tuple[str, ...]:
        return as_tuple(self.axis)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    @property
    def group(self) -> int:
        return int(np.prod([self.sizes[a] for a in self.axes]))

    @property
    def mesh(self) -> Mesh:
        kind = AxisType.Explicit if self.explicit else AxisType.Auto
        devices = np.array(jax.devices()[: world(self.sizes)]).reshape(tuple(self.sizes.values()))
        return Mesh(devices, self.names, axis_types=(kind,) * len(self.shape))


GRIDS = (
    Grid((("data", 4),), "data"),
    Grid((("data", 2), ("model", 2)), "model"),
    Grid((("data", 2), ("model", 3)), ("model", "data")),
    Grid((("a", 2), ("b", 2), ("c", 2)), ("a", "c")),
    Grid((("data", 2), ("one", 1)), ("data", "one")),
    Grid((("a", 2), ("b", 2), ("c", 2)), ("c", "a", "b"), explicit=True),
)


@dataclass(frozen=True)
class Cell:
    """A program of the matrix."""

    case: Case
    dtype: str
    grid: Grid
    check_vma: bool

    def __str__(self) -> str:
        return f"{self.case}-{self.dtype}-{self.grid}-{'vma' if self.check_vma else 'no_vma'}"

    @property
    def floating(self) -> bool:
        return "float" in self.dtype

    @property
    def invariant(self) -> bool:
        """Whether jax types the result as equal on every device."""
        return self.check_vma and self.case.invariant

    @property
    def local(self) -> tuple[int, ...]:
        """The shape of a shard: long where the collective divides it, else short."""
        shape = [2, 3]
        if self.case.divides is not None:
            shape[self.case.divides] *= self.grid.group
        return tuple(shape)

    @property
    def result_dtype(self) -> np.dtype:
        if self.floating:
            return jnp.dtype(self.dtype)
        if self.case.averages:
            return np.dtype(np.float32)
        return np.dtype(np.int32 if self.dtype == "bool" and self.case.sums else self.dtype)

    def op(self, x: Any) -> Any:
        return self.case.call(x, self.grid.axis)

    def expect(self, shards: np.ndarray) -> np.ndarray:
        return self.case.expect(shards, self.grid.sizes, self.grid.axes)


class Truth:
    """What NumPy says of a cell: of its values, and of its derivatives in both modes."""

    def __init__(self, cell: Cell) -> None:
        wide = np.float64 if cell.floating else np.int64
        self.cell = cell
        self.given = {name: np.asarray(x, wide) for name, x in make_inputs(cell).items()}
        self.value = cell.expect(self.given["x"])
        self.rows = self._each_row(cell.expect, "rows")

    def forward(self) -> np.ndarray:
        jacobian = jacobian_of(self.cell.case, self.cell.grid, self.cell.local)
        return (jacobian @ self.given["tangent"].ravel()).reshape(self.value.shape)

    def reverse(self, cotangent: np.ndarray) -> np.ndarray:
        jacobian = jacobian_of(self.cell.case, self.cell.grid, self.cell.local)
        return (cotangent.ravel() @ jacobian).reshape(self.given["x"].shape)

    def transpose(self) -> np.ndarray:
        """Of an invariant result there is one cotangent, which counts once."""
        cotangent = self.given["cotangent"]
        if not self.cell.invariant:
            return self.reverse(cotangent)
        grid = self.cell.grid
        once = lambda group: np.concatenate([group[:1], 0 * group[1:]])  # noqa: E731
        return self.reverse(oracle.per_group(once, cotangent, grid.sizes, grid.axes))

    def gradient(self) -> np.ndarray:
        return self.reverse(self.given["weights"])

    def gradient_of_rows(self) -> np.ndarray:
        return self._each_row(self.reverse, "weights of rows")

    def _each_row(self, f: Callable[[np.ndarray], np.ndarray], name: str) -> np.ndarray:
        return np.stack([f(self.given[name][:, i]) for i in range(ROWS)], axis=1)


@functools.lru_cache(maxsize=4)
def jacobian_of(case: Case, grid: Grid, local: tuple[int, ...]) -> np.ndarray:
    """Return the Jacobian of the oracle, [outputs, inputs], column by column."""
    shape = (world(grid.sizes), *local)
    basis = np.eye(int(np.prod(shape))).reshape(-1, *shape)
    columns = [case.expect(unit, grid.sizes, grid.axes).ravel() for unit in basis]
    return np.stack(columns, axis=-1)


def make_inputs(cell: Cell) -> Arrays:
    """Return the inputs [world, ...]; floats are small whole numbers, whose sums nothing rounds."""
    rng = np.random.default_rng(0)
    n = world(cell.grid.sizes)
    low, high = {"int8": (-128, 128), "int32": (-(2**31), 2**31)}.get(cell.dtype, (-8, 8))

    def draw(*shape: int) -> np.ndarray:
        whole = rng.integers(low, high, shape)
        return whole > 0 if cell.dtype == "bool" else whole.astype(cell.dtype)

    out = cell.expect(np.zeros((n, *cell.local))).shape[1:]
    cotangent = draw(n, *out)
    if cell.invariant:
        cotangent = oracle.per_group(oracle.broadcast, cotangent, cell.grid.sizes, cell.grid.axes)
    return {
        "x": draw(n, *cell.local),
        "rows": draw(n, ROWS, *cell.local),
        "tangent": draw(n, *cell.local),
        "cotangent": cotangent,
        "weights": draw(n, *out),
        "weights of rows": draw(n, ROWS, *out),
    }
