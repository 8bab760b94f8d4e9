"""The all-gather: each device's block goes both ways round, half of the way each.

On GPUs it goes through the switch of their node instead.
"""

from typing import Any

import jax
from jax import lax

from txcore.kernels.ring import multimem, neighbours
from txcore.kernels.ring.call import call_ring, ring_size
from txcore.kernels.ring.neighbours import Ring


def gather_blocks(block: jax.Array, axis: str, interpret: Any) -> jax.Array:
    """Return (n, rows, columns), the blocks (rows, columns) of all devices of an axis.

    A block lands in a place of its own, which is written once: the kernel's one start suffices.
    Each device sends n - 1 blocks; on a GPU one, which the switch multiplies.
    """
    if multimem.runs_by_switch(interpret):
        return multimem.gather_flat(block.reshape(-1)).reshape(-1, *block.shape)
    from jax.experimental.pallas import tpu as pltpu

    size = ring_size(axis)
    semaphores = [pltpu.SemaphoreType.DMA((2, size // 2))] * 2
    (out,) = call_ring(
        _gather_kernel,
        axis,
        [block],
        [((size, *block.shape), block.dtype)],
        [*semaphores, pltpu.SemaphoreType.DMA],
        name="ring_all_gather",
        interpret=interpret,
    )
    return out


def _gather_kernel(ring: Ring, block: Any, out: Any, sent: Any, received: Any, copied: Any) -> None:
    from jax.experimental.pallas import tpu as pltpu

    # In an even ring the opposite device gets a block from one side alone.
    steps = {1: ring.size // 2, -1: (ring.size - 1) // 2}

    def send(by: int, step: Any, source: Any = None) -> Any:
        """Describe the copy onward of the block from `step` places back."""
        lane, here = neighbours.DIRECTIONS.index(by), out.at[neighbours.place_of(ring, -by * step)]
        source = here if source is None else source
        semaphores = sent.at[lane, step], received.at[lane, step]
        return neighbours.copy_to_neighbour(source, here, *semaphores, ring, by)

    neighbours.meet_neighbours(ring)
    for by in steps:
        if steps[by]:
            send(by, 0, block).start()
    own = pltpu.make_async_copy(block, out.at[neighbours.place_of(ring, 0)], copied)
    own.start()

    def pass_on(step: Any, carry: None) -> None:
        for by in steps:
            # The same slot's descriptor: what arrives is as large as what was sent.
            send(by, step - 1).wait_recv()
            send(by, step).start()

    both = steps[-1]
    lax.fori_loop(1, max(both, 1), pass_on, None)
    for by in steps:
        if both:
            send(by, both - 1).wait_recv()
    if steps[1] > both:
        if both:
            send(1, both).start()
        send(1, both).wait_recv()
    for by in steps:
        lax.fori_loop(0, steps[by], lambda step, carry, by=by: send(by, step).wait_send(), None)
    own.wait()
