"""The ways of calling a collective: jax's transformations, inside a shard_map and around it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from matrix import Arrays, Cell, Truth


@dataclass(frozen=True)
class Way:
    """A way of calling a collective.

    Attributes:
      apply: (cell, f, given) -> result. Inside a shard_map f is the collective, and `given` what
        one device holds; around it f is the whole shard_map, and `given` holds all devices' [n,
        ...].
      expect: its truth.
      kind: "value"; "derivative", of a linear collective; "constant", of none.
      around: whether it stands around the shard_map.
    """

    apply: Callable[[Cell, Any, Arrays], Any]
    expect: Callable[[Truth], np.ndarray]
    kind: str = "value"
    around: bool = False

    def fits(self, cell: Cell) -> bool:
        if self.kind == "derivative":
            return cell.floating and cell.case.linear
        return cell.floating or self.kind == "value"


def backwards(f: Any) -> Any:
    """Return f in a custom_vjp, whose backward pass nobody needs."""
    custom = jax.custom_vjp(f)
    custom.defvjp(lambda x: (f(x), None), lambda _, cotangent: (cotangent,))
    return custom


def scanned(f: Any, rows: Any, wrapper: Any = lambda f: f) -> Any:
    """Apply f to each row by a scan, whose body is wrapped."""
    return lax.scan(wrapper(lambda carry, row: (carry, f(row))), 0, rows)[1]


def over_devices(f: Any, rows: Any, make: Any) -> Any:
    """Apply f to [n, rows, ...] with the rows in front."""
    return jnp.moveaxis(make(f, jnp.moveaxis(rows, 1, 0)), 0, 1)


def like(cotangent: Any, y: Any, cell: Cell) -> Any:
    """Return a cotangent typed as `y` is; where that is invariant it is equal already."""
    varying = jax.typeof(y).manual_axis_type.varying if cell.check_vma else cell.grid.names
    equal = tuple(name for name in cell.grid.names if name not in varying)
    return lax.pmax(cotangent, equal) if equal else cotangent


def transpose(cell: Cell, f: Any, given: Arrays) -> Any:
    y, pull = jax.vjp(f, given["x"])
    return pull(like(given["cotangent"], y, cell))[0]


def weighed(f: Any, weights: Any) -> Any:
    """Return the gradient of the sum of f(x) times weights."""
    return jax.grad(lambda x: (f(x) * weights).sum())


def beside_counts(cell: Cell, f: Any, given: Arrays) -> Any:
    """A gradient through one leaf, with counts, which have none, in another."""
    counts = jnp.full(given["x"].shape, lax.axis_index(cell.grid.names))
    return weighed(lambda x: f({"x": x, "counts": counts})["x"], given["weights"])(given["x"])


WAYS = {
    "call": Way(lambda c, f, g: f(g["x"]), lambda t: t.value),
    "leaves": Way(
        lambda c, f, g: f({"a": g["x"], "b": [g["rows"][1], None]})["b"][0],
        lambda t: t.rows[:, 1],
    ),
    "remat of jit": Way(lambda c, f, g: jax.checkpoint(jax.jit(f))(g["x"]), lambda t: t.value),
    "custom_vjp": Way(lambda c, f, g: backwards(f)(g["x"]), lambda t: t.value),
    "vmap": Way(lambda c, f, g: jax.vmap(f)(g["rows"]), lambda t: t.rows),
    "vmap of another dim": Way(
        lambda c, f, g: jax.vmap(f, 2, -1)(jnp.moveaxis(g["rows"], 0, 2)),
        lambda t: np.moveaxis(t.rows, 1, -1),
    ),
    "scan": Way(lambda c, f, g: scanned(f, g["rows"]), lambda t: t.rows),
    "vmap around": Way(lambda c, f, g: jax.vmap(f, 1, 1)(g["rows"]), lambda t: t.rows, around=True),
    "vmap of another dim around": Way(
        lambda c, f, g: jax.vmap(f, 2, -1)(jnp.moveaxis(g["rows"], 1, 2)),
        lambda t: np.moveaxis(t.rows, 1, -1),
        around=True,
    ),
    "scan around": Way(
        lambda c, f, g: over_devices(f, g["rows"], scanned), lambda t: t.rows, around=True
    ),
    "jvp": Way(
        lambda c, f, g: jax.jvp(f, (g["x"],), (g["tangent"],))[1], Truth.forward, "derivative"
    ),
    "jvp of vmap": Way(
        lambda c, f, g: jax.jvp(jax.vmap(f), (g["rows"],), (g["rows"],))[1],
        lambda t: t.rows,  # it is linear
        "derivative",
    ),
    "transpose": Way(transpose, Truth.transpose, "derivative"),
    "grad beside counts": Way(beside_counts, Truth.gradient, "derivative"),
    "grad of vmap": Way(
        lambda c, f, g: weighed(jax.vmap(f), g["weights of rows"])(g["rows"]),
        Truth.gradient_of_rows,
        "derivative",
    ),
    "grad of scan of remat": Way(
        lambda c, f, g: weighed(
            lambda rows: scanned(f, rows, jax.checkpoint), g["weights of rows"]
        )(g["rows"]),
        Truth.gradient_of_rows,
        "derivative",
    ),
    "jvp around": Way(
        lambda c, f, g: jax.jvp(f, (g["x"],), (g["tangent"],))[1],
        Truth.forward,
        "derivative",
        around=True,
    ),
    "grad around remat": Way(
        lambda c, f, g: weighed(jax.checkpoint(f), g["weights"])(g["x"]),
        Truth.gradient,
        "derivative",
        around=True,
    ),
    "grad around vmap": Way(
        lambda c, f, g: weighed(jax.vmap(f, 1, 1), g["weights of rows"])(g["rows"]),
        Truth.gradient_of_rows,
        "derivative",
        around=True,
    ),
    "grad of a constant": Way(
        lambda c, f, g: jax.grad(
            lambda x: (x * g["tangent"]).sum() + (f(lax.stop_gradient(x)) * g["weights"]).sum()
        )(g["x"]),
        lambda t: t.given["tangent"],
        "constant",
    ),
}
