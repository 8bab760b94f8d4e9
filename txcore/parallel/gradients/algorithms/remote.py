"""A ring of TPUs by remote DMA, in Pallas kernels."""

import jax
import jax.numpy as jnp

from txcore.collectives import pmean, reduce_scatter
from txcore.kernels.ring import count_sent
from txcore.parallel.gradients.algorithms.record import Axes, Sizes, count_devices, predict_sent
from txcore.parallel.predicted import Predicted


def remote_mean(flat: jax.Array, axes: Axes, name: str) -> jax.Array:
    """Average by a reduce-scatter round the ring, and an all-gather."""
    return pmean(flat, axes, algorithm="remote_dma", name=name)


def remote_blocks(blocks: jax.Array, axes: Axes, name: str) -> jax.Array:
    """Average by a reduce-scatter round the ring."""
    return reduce_scatter(blocks, axes, mean=True, algorithm="remote_dma", name=name)[0]


def send_remote(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    """Return what `remote_mean` sends: each kernel what its device copies to its neighbours."""
    devices = count_devices(sizes)
    sent = count_sent((-(-elements // devices),), jnp.dtype(dtype), devices)
    return [predict_sent("remote-dma", sizes, dtype, sent, sent)]


def send_remote_blocks(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    """Return what `remote_blocks` sends."""
    devices = count_devices(sizes)
    sent = count_sent((1, elements // devices), jnp.dtype(dtype), devices)
    return [predict_sent("remote-dma", sizes, dtype, sent)]
