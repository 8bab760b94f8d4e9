"""The squared norm of an array in one pass over it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from txcore.kernels.common import checks, pallas_tiles
from txcore.kernels.common import pallas_masked as masked
from txcore.kernels.dispatch import registry
from txcore.kernels.dispatch.problem import Problem
from txcore.kernels.optimizer import pallas


@dataclass(frozen=True)
class Config:
    """Hold into how many parts the array is split, which are added up before one sum."""

    parts: int


def squared_norm(
    x: ArrayLike,
    *,
    implementation: registry.Implementation | None = None,
    config: Any = None,
) -> jax.Array:
    """Compute the sum of the squares of an array, for its norm or a norm over several arrays.

    Reads each element once: with the root of the sum over all gradients as `norm`,
    `grad_scale=jnp.minimum(1, max_norm / norm)` makes an update clip them without a pass of its
    own (`txcore.optim.sgd(..., clip_norm=)` does). Accumulated in float32 or wider over blocks,
    so that the error does not grow with the size: 2e-7 of the sum at ten million elements.

    Args:
      x: any shape and floating dtype.
      implementation: None for the fastest known, "xla" or "pallas".
      config: a configuration of the implementation that is named; None for its best guess.

    Returns:
      Scalar, float32 or wider; inf or nan where an element is, or where a square exceeds the dtype.

    Raises:
      TypeError: `x` is not floating-point, or `config` is another implementation's.
      ValueError: there is no implementation of that name, or a config without one.
      NotImplementedError: the implementation cannot run this.

    Example:
      >>> import jax.numpy as jnp
      >>> from txcore import kernels
      >>> float(kernels.squared_norm(jnp.array([3.0, 4.0], jnp.bfloat16)))
      25.0
    """
    (x,) = checks.float_arrays("squared_norm", x=x)
    return registry.run("squared_norm", KERNELS, x, implementation=implementation, config=config)


def _configs(problem: Problem) -> Sequence[Config]:
    # Without YNN fusions (see `compiler_options`) XLA:CPU sums one element after the other: 0.3 ms
    # at 0.4 million elements and 120 ms at ten; 64 parts added up first 0.1 and 14 ms.
    return (Config(64), Config(1)) if problem.platform == "cpu" else (Config(1), Config(64))


def _run(x: jax.Array, *, config: Config | pallas.Config) -> jax.Array:
    return _sum(x, config)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _sum(x: jax.Array, config: Config | pallas.Config) -> jax.Array:
    return _in_parts(x, config) if isinstance(config, Config) else _by_runs(x, config)


@_sum.defjvp
def _jvp(config: Any, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> Any:
    # Not through the parts: their gradients would be put together from 64 slices.
    (x,), (dx,) = primals, tangents
    out = _sum(x, config)
    return out, jnp.sum(2 * x.astype(out.dtype) * dx.astype(out.dtype))


def _in_parts(x: jax.Array, config: Config) -> jax.Array:
    flat = x.reshape(-1)
    length = flat.size // config.parts
    parts = [_squares(flat[i * length : (i + 1) * length]) for i in range(config.parts)]
    rest = _squares(flat[config.parts * length :])
    return jnp.sum(sum(parts[1:], parts[0])) + jnp.sum(rest)


def _squares(x: jax.Array) -> jax.Array:
    return jnp.square(x.astype(checks.accumulator(x.dtype)))


def _by_runs(x: jax.Array, config: pallas.Config) -> jax.Array:
    from jax.experimental import pallas as pl

    size, elements = x.size, pallas_tiles.block(x.size, config.elements)
    programs = -(-size // elements)
    if not size:
        return jnp.sum(_squares(x))

    def kernel(x_ref: Any, out_ref: Any) -> None:
        program = pl.program_id(0)
        place = masked.numbers(program * elements, elements)

        def add(inside: jax.Array | None) -> None:
            masked.store(out_ref, program, jnp.sum(_squares(masked.load(x_ref, place, inside))))

        # Without a mask where none is needed: it would keep a GPU from loading 16 bytes at once.
        if size >= elements:
            pl.when(program < size // elements)(lambda: add(None))
        if size % elements:
            pl.when(program == size // elements)(lambda: add(place < size))

    results = [(programs, checks.accumulator(x.dtype))]
    (sums,) = masked.call(kernel, (programs,), results, x, warps=config.warps)
    return jnp.sum(sums)


KERNELS: registry.Kernels = {
    "xla": registry.Kernel(_run, _configs),
    "pallas": registry.Kernel(_run, pallas.configs),
}
