"""The squared norm of an array in one pass over it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from txcore.kernels.common import checks, mosaic_blocks, pallas_tiles
from txcore.kernels.common import pallas_masked as masked
from txcore.kernels.dispatch import registry
from txcore.kernels.dispatch.problem import Problem
from txcore.kernels.optimizer import pallas
from txcore.kernels.squared_norm import mosaic


@dataclass(frozen=True)
class Config:
    """Hold the number of parts of the array that are added up elementwise, before one sum."""

    parts: int


_AnyConfig = Config | pallas.Config | mosaic.Config


def squared_norm(
    x: ArrayLike,
    *,
    implementation: registry.Implementation | None = None,
    config: Any = None,
) -> jax.Array:
    """Compute the sum of the squares of an array, for its norm or a norm over several arrays.

    It reads each element once. To clip without a further pass, give an update
    `grad_scale=jnp.minimum(1, max_norm / norm)`, where `norm` is the root of the sum over all
    gradients (`txcore.optim.sgd(..., clip_norm=)` does this). The sum is accumulated in float32 or
    wider over blocks, so that the error does not grow with the size: it is 2e-7 of the sum at ten
    million elements.

    Args:
      x: any shape and floating dtype.
      implementation: None for the fastest known, or a back end by name: "xla", or "pallas" for the
        platform's Pallas kernel (`txcore.kernels.dispatch.back_ends` lists all).
      config: a configuration of the named implementation; None for its best guess.

    Returns:
      Scalar, float32 or wider; inf or nan if an element is, or if a square overflows the dtype.

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
    (x,) = checks.require_floats("squared_norm", x=x)
    return registry.run_op("squared_norm", KERNELS, x, implementation=implementation, config=config)


def _list_configs(problem: Problem) -> Sequence[Config]:
    # Ten million elements on CPU: 15 ms as one sum, 30 in 64 parts that are added up first; 110 and
    # 15 where XLA may not hand the sum to its YNN library (see `compiler_options`).
    return Config(1), Config(64)


def _compute_squared_norm(x: jax.Array, *, config: _AnyConfig) -> jax.Array:
    return _sum_squares(x, config)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _sum_squares(x: jax.Array, config: _AnyConfig) -> jax.Array:
    if isinstance(config, mosaic.Config):
        return mosaic.sum_squares(x, config)
    return _sum_in_parts(x, config) if isinstance(config, Config) else _sum_by_runs(x, config)


@_sum_squares.defjvp
def _differentiate_sum(config: Any, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> Any:
    # Its own rule, since autodiff would put the gradient together from 64 slices.
    (x,), (dx,) = primals, tangents
    out = _sum_squares(x, config)
    return out, jnp.sum(2 * x.astype(out.dtype) * dx.astype(out.dtype))


def _sum_in_parts(x: jax.Array, config: Config) -> jax.Array:
    flat = x.reshape(-1)
    length = flat.size // config.parts
    parts = [_square_elements(flat[i * length : (i + 1) * length]) for i in range(config.parts)]
    rest = _square_elements(flat[config.parts * length :])
    return jnp.sum(sum(parts[1:], parts[0])) + jnp.sum(rest)


def _square_elements(x: jax.Array) -> jax.Array:
    return jnp.square(x.astype(checks.accumulator(x.dtype)))


def _sum_by_runs(x: jax.Array, config: pallas.Config) -> jax.Array:
    from jax.experimental import pallas as pl

    size, elements = x.size, pallas_tiles.block_size(x.size, config.elements)
    programs = -(-size // elements)
    if not size:
        return jnp.sum(_square_elements(x))

    def kernel(x_ref: Any, out_ref: Any) -> None:
        program = pl.program_id(0)
        place = masked.count_from(program * elements, elements)

        def add_squares(inside: jax.Array | None) -> None:
            masked.store(
                out_ref, program, jnp.sum(_square_elements(masked.load(x_ref, place, inside)))
            )

        # Full runs have no mask: with one, a GPU cannot load 16 bytes at a time.
        if size >= elements:
            pl.when(program < size // elements)(lambda: add_squares(None))
        if size % elements:
            pl.when(program == size // elements)(lambda: add_squares(place < size))

    results = [(programs, checks.accumulator(x.dtype))]
    (sums,) = masked.call_kernel(kernel, (programs,), results, x, warps=config.warps)
    return jnp.sum(sums)


KERNELS: registry.Kernels = {
    "xla": registry.Kernel(_compute_squared_norm, _list_configs),
    "pallas_triton": registry.Kernel(_compute_squared_norm, pallas.list_configs),
    "mosaic_tpu": registry.Kernel(
        _compute_squared_norm, mosaic.list_configs, mosaic_blocks.explain_refusal
    ),
}
