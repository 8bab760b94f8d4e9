"""The reduce-scatter: partial sums go round the ring, half of each block either way.

A block is cut into chunks of vector memory's size. In step t of a direction a device sends the
sum that it has to the next, while it reads its own part of the sum that is to arrive. Both ends
have two slots of a chunk. A device may send step t only when its neighbour has used what came in
step t - 2: the neighbour grants that room by a semaphore, the credit.

On GPUs the switch of their node adds instead.
"""

import functools
from typing import Any

import jax
from jax import lax

from txcore.kernels.ring import multimem, neighbours
from txcore.kernels.ring.blocks import Rows
from txcore.kernels.ring.call import add_wide, call_ring
from txcore.kernels.ring.neighbours import Ring

_SLOTS = 2


def scatter_sums(blocks: jax.Array, laid: Rows, axis: str, interpret: Any) -> jax.Array:
    """Return (rows, columns), the sum over an axis' devices of this device's block.

    Args:
      blocks: (n, rows, columns), one for each device of the axis.
      laid: how a block lies in its rows, in an even number of chunks.
      axis: the mesh axis.
      interpret: as for `call_ring`.
    """
    if multimem.runs_by_switch(interpret):
        size = laid.rows * laid.columns
        return multimem.scatter_flat(blocks.reshape(-1), size).reshape(laid.rows, laid.columns)
    from jax.experimental.pallas import tpu as pltpu

    chunk = (laid.chunk_rows, laid.columns)
    kernel = functools.partial(_scatter_kernel, chunks=laid.chunks // 2)
    buffers = [pltpu.VMEM((2, _SLOTS, *chunk), blocks.dtype)] * 2
    (out,) = call_ring(
        kernel,
        axis,
        [blocks],
        [((laid.rows, laid.columns), blocks.dtype)],
        [
            *buffers,
            pltpu.VMEM((2, *chunk), blocks.dtype),
            *[pltpu.SemaphoreType.DMA((2, _SLOTS))] * 2,
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.REGULAR((2,)),
        ],
        name="ring_reduce_scatter",
        interpret=interpret,
    )
    return out


def _scatter_kernel(
    ring: Ring,
    blocks: Any,
    out: Any,
    to_send: Any,
    arrived: Any,
    own: Any,
    sent: Any,
    received: Any,
    copied: Any,
    credit: Any,
    *,
    chunks: int,
) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    hops = ring.size - 1
    steps = chunks * hops
    chunk_rows = own.shape[1]

    def rows_of(lane: int, chunk: Any) -> Any:
        return pl.ds((lane * chunks + chunk) * chunk_rows, chunk_rows)

    def send(lane: int, slot: Any) -> Any:
        refs = to_send.at[lane, slot], arrived.at[lane, slot]
        semaphores = sent.at[lane, slot], received.at[lane, slot]
        return neighbours.copy_to_neighbour(*refs, *semaphores, ring, neighbours.DIRECTIONS[lane])

    def read(lane: int, back: Any, chunk: Any, target: Any) -> Any:
        """Describe reading this device's part of a chunk of the block from `back` places back."""
        block = neighbours.place_of(ring, -neighbours.DIRECTIONS[lane] * back)
        source = blocks.at[block, rows_of(lane, chunk)]
        return pltpu.make_async_copy(source, target, copied.at[lane])

    def use_arrived(lane: int, step: Any, slot: Any, target: Any) -> None:
        """Add this device's part to the sum that arrived, and grant its room to the sender."""
        target[...] = add_wide(arrived[lane, slot], own[lane])

        @pl.when(step + _SLOTS < steps)
        def _() -> None:
            by = neighbours.DIRECTIONS[lane]
            neighbours.grant_room(credit.at[lane], ring, -by)

    def take_step(step: Any, carry: None) -> None:
        slot, chunk, hop = step % _SLOTS, step // hops, step % hops
        for lane in range(2):

            @pl.when(step >= _SLOTS)
            def _(lane: int = lane) -> None:
                send(lane, slot).wait_send()

            @pl.when(hop == 0)
            def _(lane: int = lane) -> None:
                first = read(lane, 1, chunk, to_send.at[lane, slot])
                first.start()
                first.wait()

            @pl.when(hop > 0)
            def _(lane: int = lane) -> None:
                use_arrived(lane, step - 1, 1 - slot, to_send.at[lane, slot])

            @pl.when(step >= _SLOTS)
            def _(lane: int = lane) -> None:
                neighbours.take_room(credit.at[lane])

            send(lane, slot).start()
            read(lane, 2 + hop, chunk, own.at[lane]).start()
        for lane in range(2):
            read(lane, 2 + hop, chunk, own.at[lane]).wait()
            send(lane, slot).wait_recv()

            @pl.when(hop == hops - 1)
            def _(lane: int = lane) -> None:
                use_arrived(lane, step, slot, own.at[lane])
                target = out.at[rows_of(lane, chunk)]
                done = pltpu.make_async_copy(own.at[lane], target, copied.at[lane])
                done.start()
                done.wait()

    neighbours.meet_neighbours(ring)
    lax.fori_loop(0, steps, take_step, None)
    for lane in range(2):
        for step in range(max(steps - _SLOTS, 0), steps):
            send(lane, step % _SLOTS).wait_send()
