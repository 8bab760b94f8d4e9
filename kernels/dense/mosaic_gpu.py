"""The dense layer by Mosaic GPU, for compute capability 9.0: TMA, wgmma, and the bias at its end.

A warp group computes a tile. Factors arrive in shared memory some steps ahead, and the tensor cores
read them there; the bias and ReLU are applied to the sums in registers. The gradients are products
alone, which are XLA's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from txcore import _compat, varying
from txcore.kernels.common import pallas_tiles
from txcore.kernels.dense import xla
from txcore.kernels.dispatch import registry
from txcore.kernels.dispatch.problem import Problem

DTYPES = ("bfloat16", "float16")
ACTIVATIONS = (None, "relu")
HOPPER = ("H100", "H200")


@dataclass(frozen=True)
class Config:
    """Hold the tile that a warp group computes, and how its factors arrive.

    Args:
      rows: rows of the tile, a multiple of 64.
      columns: columns of the tile, a multiple of 64 up to 256.
      inner: how much of the contracted dim arrives at once, a multiple of 64.
      stages: how many of these are in flight or in use.
    """

    rows: int = 128
    columns: int = 128
    inner: int = 64
    stages: int = 4


def list_configs(problem: Problem) -> Sequence[Config]:
    """Return the tiles worth trying, the best guess first."""
    return Config(), Config(rows=64, stages=6), Config(rows=64, columns=256)


def explain_refusal(problem: Problem) -> str | None:
    """Return why the kernel cannot compute a problem, or None."""
    activation, dtype = problem.get_option("activation"), problem.dtypes[0]
    if jax.__version_info__ < (0, 11):
        return f"its kernel needs jax 0.11 or newer, and {jax.__version__} is installed"
    if dtype not in DTYPES:
        return f"its kernel multiplies {' and '.join(DTYPES)}, and the operands are {dtype}"
    if activation not in ACTIVATIONS or problem.get_option("dropout"):
        return "its kernel has no dropout, and no activation but None and 'relu'"
    if problem.platform == "gpu" and not any(name in problem.device for name in HOPPER):
        return f"its kernel is for {' and '.join(HOPPER)}, and the device is {problem.device}"
    if any(0 in shape for shape in problem.shapes):
        return "its kernel needs at least one element of each operand"
    return None


def dense(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    *,
    config: Config,
    activation: str | None,
    dropout: float,
) -> jax.Array:
    """Compute the op of `txcore.kernels.dense` on checked operands."""
    out = _dense(x.reshape(-1, x.shape[-1]), w, b, activation, config)
    return out.reshape(*x.shape[:-1], w.shape[1])


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _dense(
    x: jax.Array, w: jax.Array, b: jax.Array, activation: str | None, config: Config
) -> jax.Array:
    return _compute_layer(x, w, b, activation, config)


def _forward(
    x: jax.Array, w: jax.Array, b: jax.Array, activation: str | None, config: Config
) -> tuple[jax.Array, xla.Residuals]:
    out = _compute_layer(x, w, b, activation, config)
    return out, (x, w, out if activation else None, None, None)


def _backward(
    activation: str | None, config: Config, residuals: xla.Residuals, g: jax.Array
) -> tuple[jax.Array, ...]:
    return xla.backward(activation, 0.0, xla.Config(False), residuals, g)[:3]


_dense.defvjp(_forward, _backward)


def _compute_layer(
    x: jax.Array, w: jax.Array, b: jax.Array, activation: str | None, config: Config
) -> jax.Array:
    (count, _), features = x.shape, w.shape[1]
    x = pallas_tiles.pad_to_blocks(x, config.rows, config.inner)
    w = pallas_tiles.pad_to_blocks(w, config.inner, config.columns)
    b = jnp.pad(b, (0, w.shape[1] - features))

    def call(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
        return _call_kernel(x, w, b, activation, config)

    # Mosaic GPU has no rule for vmap: one launch after the other.
    out = varying.run_untracked(jax.custom_batching.sequential_vmap(call), x, w, b)
    return out[:count, :features]  # type: ignore[no-any-return]


def _call_kernel(
    x: jax.Array, w: jax.Array, b: jax.Array, activation: str | None, config: Config
) -> jax.Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu

    mgpu: Any = mosaic_gpu  # its classes look abstract to a type checker
    rows, columns, inner = config.rows, config.columns, config.inner
    # A row of 64 elements of 2 bytes, as the tensor cores want it to lie in shared memory.
    layout = (mgpu.TilingTransform((8, 64)), mgpu.SwizzleTransform(128))

    def kernel(
        x_ref: Any, w_ref: Any, b_ref: Any, out_ref: Any, *, out: Any, bias: Any, arrived: Any
    ) -> None:
        i, j = lax.axis_index("row"), lax.axis_index("column")
        mgpu.copy_gmem_to_smem(b_ref.at[pl.ds(j * columns, columns)], bias, arrived)

        def add_products(total: Any) -> jax.Array:
            def add_product(_: Any, left: Any, right: Any) -> None:
                mgpu.wgmma(total, left, right)
                mgpu.wgmma_wait(1)  # the one before has read its factors

            sides = [
                mgpu.BlockSpec((rows, inner), lambda k: (i, k), transforms=layout, delay_release=1),
                mgpu.BlockSpec(
                    (inner, columns), lambda k: (k, j), transforms=layout, delay_release=1
                ),
            ]
            mgpu.emit_pipeline(
                add_product,
                grid=(x_ref.shape[1] // inner,),
                in_specs=sides,
                max_concurrent_steps=config.stages,
            )(x_ref, w_ref)
            return total[...]  # type: ignore[no-any-return]

        y = pl.run_scoped(add_products, mgpu.ACC((rows, columns), jnp.float32))
        mgpu.barrier_wait(arrived)
        row = mgpu.load(bias, layout=mgpu.Layout.WGMMA.reduce(0)).astype(jnp.float32)
        y = y + lax.broadcast_in_dim(row, (rows, columns), (1,))
        out[...] = (jnp.maximum(y, 0) if activation else y).astype(out.dtype)
        mgpu.commit_smem()
        place = pl.ds(i * rows, rows), pl.ds(j * columns, columns)
        mgpu.copy_smem_to_gmem(out, out_ref.at[place])
        mgpu.wait_smem_to_gmem(0)

    on_cpu = registry.current_device()[0] == "cpu"
    run = mgpu.kernel(
        kernel,
        out_type=_compat.shape_like(x, (x.shape[0], w.shape[1]), x.dtype),
        scratch_types={
            "out": mgpu.SMEM((rows, columns), x.dtype, transforms=layout),
            "bias": mgpu.SMEM((columns,), x.dtype),
            "arrived": mgpu.Barrier(),
        },
        grid=(x.shape[0] // rows, w.shape[1] // columns),
        grid_names=("row", "column"),
        interpret=mgpu.InterpretGPUParams() if on_cpu else None,
    )
    return run(x, w, b)  # type: ignore[no-any-return]
