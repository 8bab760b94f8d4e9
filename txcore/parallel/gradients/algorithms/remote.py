"""A ring of TPUs by remote DMA, or the switch of a node of GPUs, in Pallas kernels."""

import jax
import jax.numpy as jnp

from txcore.collectives import pmean, reduce_scatter
from txcore.kernels.ring import count_laid
from txcore.parallel.gradients.algorithms.record import Axes, Sizes, count_devices, predict_sent
from txcore.parallel.predicted import Predicted


def remote_mean(flat: jax.Array, axes: Axes, name: str) -> jax.Array:
    """Average by a reduce-scatter and an all-gather."""
    return pmean(flat, axes, algorithm="remote_dma", name=name)


def remote_blocks(blocks: jax.Array, axes: Axes, name: str) -> jax.Array:
    """Average by a reduce-scatter."""
    return reduce_scatter(blocks, axes, mean=True, algorithm="remote_dma", name=name)[0]


def send_round(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    """Return what `remote_mean` sends on TPU: each kernel what a device copies onward."""
    devices = count_devices(sizes)
    sent = (devices - 1) * count_laid((-(-elements // devices),), jnp.dtype(dtype))
    return [predict_sent("remote-dma", sizes, dtype, sent, sent)]


def send_blocks_round(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    """Return what `remote_blocks` sends on TPU."""
    devices = count_devices(sizes)
    sent = (devices - 1) * count_laid((1, elements // devices), jnp.dtype(dtype))
    return [predict_sent("remote-dma", sizes, dtype, sent)]


def send_to_switch(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    """Return what `remote_mean` sends on GPU: all that the switch adds, and then a shard."""
    devices = count_devices(sizes)
    shard = count_laid((-(-elements // devices),), jnp.dtype(dtype))
    return [predict_sent("remote-dma", sizes, dtype, devices * shard, shard)]


def send_blocks_to_switch(elements: int, dtype: str, sizes: Sizes) -> list[Predicted]:
    """Return what `remote_blocks` sends on GPU."""
    devices = count_devices(sizes)
    shard = count_laid((1, elements // devices), jnp.dtype(dtype))
    return [predict_sent("remote-dma", sizes, dtype, devices * shard)]
