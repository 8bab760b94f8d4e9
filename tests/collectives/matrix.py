"""One cell of the matrix: a collective, a dtype, a mesh, check_vma; all transformations in it.

Each cell is one program, since compiling takes longer than running, and one of NumPy in float64
(int64 for integers, which wrap around as the devices' do).
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from cases import CASES, Case, as_tuple, world
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DTYPES = ("float32", "float64", "bfloat16", "float16", "int8", "int32", "bool")
ROWS = 3  # that vmap and scan go over


@dataclass(frozen=True)
class Grid:
    """A mesh, the axis argument, and of which type the mesh's axes are."""

    sizes: tuple[tuple[str, int], ...]
    axis: str | tuple[str, ...]
    explicit: bool = False

    def __str__(self) -> str:
        shape = "x".join(f"{name}{size}" for name, size in self.sizes)
        return f"{shape}-over-{'+'.join(self.axes)}{'-explicit' * self.explicit}"

    @property
    def axes(self) -> tuple[str, ...]:
        return as_tuple(self.axis)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict(self.sizes))

    @property
    def group(self) -> int:
        return int(np.prod([dict(self.sizes)[a] for a in self.axes]))

    @property
    def mesh(self) -> Mesh:
        shape = tuple(dict(self.sizes).values())
        kind = AxisType.Explicit if self.explicit else AxisType.Auto
        devices = np.array(jax.devices()[: world(dict(self.sizes))]).reshape(shape)
        return Mesh(devices, self.names, axis_types=(kind,) * len(shape))


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
    def local(self) -> tuple[int, ...]:
        """The shape of a shard: the dim that the collective divides is long enough, others short."""
        shape = [2, 3]
        if self.case.op in ("reduce_scatter", "psum_scatter", "all_to_all"):
            shape[self.case.kwargs.get("split_dim", self.case.kwargs.get("dim", 0))] *= (
                self.grid.group
            )
        return tuple(shape)

    def op(self, x: jax.Array) -> jax.Array:
        return self.case.call(x, self.grid.axis)

    def expect(self, shards: np.ndarray) -> np.ndarray:
        return self.case.expect(shards, dict(self.grid.sizes), self.grid.axes)


def inside(cell: Cell, given: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return what each way of calling the collective inside a shard_map gives on this device."""
    op, x = cell.op, given["x"]
    rows = given["rows"]
    out = {
        "call": op(x),
        "vmap": jax.vmap(op)(rows),
        "vmap of another dim": jax.vmap(op, in_axes=2, out_axes=-1)(jnp.moveaxis(rows, 0, 2)),
        "scan": lax.scan(lambda carry, row: (carry, op(row)), 0, rows)[1],
        "remat": jax.checkpoint(op)(x),
        "leaves": op({"a": x, "b": [rows[1], None]})["b"][0],
    }
    if cell.floating:
        out |= derivatives(cell, given)
    return out


def derivatives(cell: Cell, given: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the derivatives by each way inside the shard_map."""
    op, x, rows, tangent = cell.op, given["x"], given["rows"], given["tangent"]
    weights, of_rows = given["weights"], given["weights of rows"]
    if not cell.case.linear:  # no derivative, unless as a constant
        return {"constant": jax.grad(lambda x: (op(lax.stop_gradient(x)) * x * tangent).sum())(x)}

    def scanned(rows: jax.Array) -> jax.Array:
        body = jax.checkpoint(lambda carry, row: (carry, op(row)))
        return (lax.scan(body, 0, rows)[1] * of_rows).sum()

    def with_counts(x: jax.Array) -> jax.Array:
        counts = jnp.arange(x.size, dtype=jnp.int32).reshape(x.shape) + lax.axis_index(
            cell.grid.names
        )
        return (op({"x": x, "counts": counts})["x"] * weights).sum()

    y, transpose = jax.vjp(op, x)
    return {
        "jvp": jax.jvp(op, (x,), (tangent,))[1],
        "jvp of vmap": jax.jvp(jax.vmap(op), (rows,), (rows,))[1],
        "transpose": transpose(like(given["cotangent"], y, cell))[0],
        "grad": jax.grad(with_counts)(x),
        "grad of vmap": jax.grad(lambda rows: (jax.vmap(op)(rows) * of_rows).sum())(rows),
        "grad of scan of remat": jax.grad(scanned)(rows),
    }


def like(cotangent: jax.Array, y: jax.Array, cell: Cell) -> jax.Array:
    """Return a cotangent, equal where `y` is, typed as invariant where `y` is."""
    equal = tuple(a for a in cell.grid.names if a not in jax.typeof(y).manual_axis_type.varying)
    return lax.pmax(cotangent, equal) if cell.check_vma and equal else cotangent


def run(cell: Cell) -> dict[str, np.ndarray]:
    """Run the cell's program; return [world, ...] of each way."""
    with jax.enable_x64(cell.dtype == "float64"):
        mesh = cell.grid.mesh
        given = {name: place(x, mesh, cell.grid) for name, x in make_inputs(cell).items()}

        def mapped(f):
            return jax.shard_map(
                lambda *args: jax.tree.map(
                    lambda y: y[None], f(*jax.tree.map(lambda v: v[0], args))
                ),
                mesh=mesh,
                in_specs=P(cell.grid.names),
                out_specs=P(cell.grid.names),
                check_vma=cell.check_vma,
            )

        def program(given):
            return {
                **mapped(functools.partial(inside, cell))(given),
                **around(cell, mapped(cell.op), given),
            }

        return jax.tree.map(np.asarray, jax.jit(program)(given))


def around(cell: Cell, whole: Any, given: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return what each transformation around the shard_map gives."""
    x, rows = given["x"], given["rows"]
    out = {
        "vmap around": jax.vmap(whole, 1, 1)(rows),
        "vmap around, of another dim": jax.vmap(whole, 2, -1)(jnp.moveaxis(rows, 1, 2)),
        "scan around": lax.scan(lambda c, row: (c, whole(row)), 0, jnp.moveaxis(rows, 1, 0))[1],
    }
    out["scan around"] = jnp.moveaxis(out["scan around"], 0, 1)
    if cell.floating and cell.case.linear:
        vmapped = jax.vmap(whole, 1, 1)
        out |= {
            "jvp around": jax.jvp(whole, (x,), (given["tangent"],))[1],
            "grad around": jax.grad(lambda x: (whole(x) * given["weights"]).sum())(x),
            "grad around vmap around": jax.grad(
                lambda rows: (vmapped(rows) * given["weights of rows"]).sum()
            )(rows),
            "grad around remat": jax.grad(
                lambda x: (jax.checkpoint(whole)(x) * given["weights"]).sum()
            )(x),
        }
    return out


def place(x: np.ndarray, mesh: Mesh, grid: Grid) -> jax.Array:
    return jax.device_put(x, NamedSharding(mesh, P(grid.names)))


def make_inputs(cell: Cell) -> dict[str, np.ndarray]:
    """Return the inputs; floats are small whole numbers, whose sums no dtype rounds."""
    rng = np.random.default_rng(0)
    n = world(dict(cell.grid.sizes))
    low, high = (-8, 8)
    if cell.dtype == "int8":
        low, high = -128, 128
    if cell.dtype == "int32":
        low, high = -(2**31), 2**31

    def draw(*shape: int) -> np.ndarray:
        whole = rng.integers(low, high, shape)
        return whole > 0 if cell.dtype == "bool" else whole.astype(cell.dtype)

    out = cell.expect(np.zeros((n, *cell.local))).shape[1:]
    cotangent = draw(n, *out)
    if cell.check_vma and is_invariant(cell.case):
        cotangent = oracle.per_group(
            oracle.broadcast, cotangent, dict(cell.grid.sizes), cell.grid.axes
        )
    return {
        "x": draw(n, *cell.local),
        "rows": draw(n, ROWS, *cell.local),
        "tangent": draw(n, *cell.local),
        "cotangent": cotangent,
        "weights": draw(n, *out),
        "weights of rows": draw(n, ROWS, *out),
    }


def is_invariant(case: Case) -> bool:
    """Tell whether the result is the same on every device by its type."""
    return case.op in ("psum", "pmean", "pmax", "pmin", "broadcast") or bool(
        case.kwargs.get("invariant")
    )


@functools.lru_cache(maxsize=8)
def matrix(case: Case, grid: Grid, local: tuple[int, ...]) -> np.ndarray:
    """Return the Jacobian of the oracle, [outputs, inputs], column by column."""
    shape = (world(dict(grid.sizes)), *local)
    basis = np.eye(int(np.prod(shape))).reshape(-1, *shape)
    columns = [case.expect(e, dict(grid.sizes), grid.axes).ravel() for e in basis]
    return np.stack(columns, axis=-1)


def expect(cell: Cell) -> dict[str, np.ndarray]:
    """Return what NumPy says of each way."""
    given = {k: np.asarray(v, wide(cell)) for k, v in make_inputs(cell).items()}
    x, rows = given["x"], given["rows"]
    value = cell.expect(x)
    per_row = np.stack([cell.expect(rows[:, i]) for i in range(ROWS)], axis=1)
    wanted = {"call": value, "vmap": per_row, "scan": per_row, "remat": value}
    wanted["vmap of another dim"] = np.moveaxis(per_row, 1, -1)
    wanted["leaves"] = per_row[:, 1]
    wanted |= {"vmap around": per_row, "scan around": per_row}
    wanted["vmap around, of another dim"] = np.moveaxis(per_row, 1, -1)
    if not cell.floating:
        return wanted
    if not cell.case.linear:
        return wanted | {"constant": value * given["tangent"]}
    jacobian = matrix(cell.case, cell.grid, cell.local)

    def forward(t: np.ndarray) -> np.ndarray:
        return (jacobian @ t.ravel()).reshape(value.shape)

    def reverse(u: np.ndarray) -> np.ndarray:
        return (u.ravel() @ jacobian).reshape(x.shape)

    cotangent = given["cotangent"]
    if cell.check_vma and is_invariant(cell.case):  # one value, which counts once
        once = oracle.per_group(
            lambda g: np.concatenate([g[:1], 0 * g[1:]]),
            cotangent,
            dict(cell.grid.sizes),
            cell.grid.axes,
        )
        cotangent = once
    weights, of_rows = given["weights"], given["weights of rows"]
    grad, grads = reverse(weights), np.stack([reverse(of_rows[:, i]) for i in range(ROWS)], 1)
    jvp = forward(given["tangent"])
    return wanted | {
        "jvp": jvp,
        "jvp of vmap": per_row,
        "transpose": reverse(cotangent),
        "grad": grad,
        "grad of vmap": grads,
        "grad of scan of remat": grads,
        "jvp around": jvp,
        "grad around": grad,
        "grad around vmap around": grads,
        "grad around remat": grad,
    }


def wide(cell: Cell) -> Any:
    return np.float64 if cell.floating else np.int64


def result_dtype(cell: Cell) -> Any:
    mean = cell.case.op == "pmean" or cell.case.kwargs.get("mean")
    if cell.floating:
        return jnp.dtype(cell.dtype)
    if mean:
        return jnp.dtype("float32")
    sums = cell.case.op in ("psum", "reduce_scatter", "psum_scatter")
    return jnp.dtype("int32" if cell.dtype == "bool" and sums else cell.dtype)
