"""reduce_scatter(x @ w): one direction's sum is on its way while the other's is multiplied.

As in `scatter.py`, the sums of the first half of each shard's rows go to the next devices, those of
the second half to the ones before. A product is added to the sum that arrived before it as it is
made, so that nothing is left to add when the next sum comes.
"""

from typing import Any

import jax
from jax import lax

from txcore.kernels.ring import neighbours
from txcore.kernels.ring.call import call_ring, ring_size
from txcore.kernels.ring.neighbours import Ring
from txcore.kernels.ring.product import accumulator, multiply

_SLOTS = 2


def product_scatter(x: jax.Array, w: jax.Array, axis: str, interpret: Any) -> jax.Array:
    """Return (2, rows, columns), this device's shard of the sum of all devices' products.

    Args:
      x: (n, 2, rows, inner): for each shard the halves of its rows, of whole tiles.
      w: (inner, columns), of whole tiles, of x's dtype.
      axis: the mesh axis.
      interpret: as for `call_ring`.
    """
    from jax.experimental.pallas import tpu as pltpu

    half = (x.shape[2], w.shape[1])
    slots = ((2, _SLOTS, *half), x.dtype)
    assert x.shape[0] == ring_size(axis)
    out, *_ = call_ring(
        _multiply_and_scatter,
        axis,
        [x, w],
        [((2, *half), x.dtype), slots, slots],  # a kernel has no scratch memory in HBM
        [
            accumulator(x, half[1]),
            *[pltpu.SemaphoreType.DMA((2, _SLOTS))] * 2,
            pltpu.SemaphoreType.REGULAR((2,)),
        ],
        name="ring_matmul_reduce_scatter",
        interpret=interpret,
        flops=2 * x.size * w.shape[1],
    )
    return out


def _multiply_and_scatter(
    ring: Ring,
    x: Any,
    w: Any,
    out: Any,
    to_send: Any,
    arrived: Any,
    total: Any,
    sent: Any,
    received: Any,
    credit: Any,
) -> None:
    from jax.experimental import pallas as pl

    hops = ring.size - 1

    def send(lane: int, slot: Any) -> Any:
        refs = to_send.at[lane, slot], arrived.at[lane, slot]
        semaphores = sent.at[lane, slot], received.at[lane, slot]
        by = neighbours.DIRECTIONS[lane]
        return neighbours.copy_to_neighbour(*refs, *semaphores, ring, by)

    def multiply_part(lane: int, hop: Any, target: Any, added: Any = None) -> None:
        """Write this device's part of the sum that leaves at a hop, plus what arrived for it."""
        back = neighbours.DIRECTIONS[lane] * (1 + hop)
        multiply(x.at[neighbours.place_of(ring, -back), lane], w, target, total, added)

    def take_hop(hop: Any, carry: None) -> None:
        slot = hop % _SLOTS
        for lane in range(2):

            @pl.when(hop >= _SLOTS)
            def _(lane: int = lane) -> None:
                send(lane, slot).wait_send()

            send(lane, 1 - slot).wait_recv()
            multiply_part(lane, hop, to_send.at[lane, slot], arrived.at[lane, 1 - slot])

            @pl.when(hop + 1 < hops)  # what came in hop - 1 is used
            def _(lane: int = lane) -> None:
                by = neighbours.DIRECTIONS[lane]
                neighbours.grant_room(credit.at[lane], ring, -by)

            @pl.when(hop >= _SLOTS)
            def _(lane: int = lane) -> None:
                neighbours.take_room(credit.at[lane])

            send(lane, slot).start()

    neighbours.meet_neighbours(ring)
    for lane in range(2):
        multiply_part(lane, 0, to_send.at[lane, 0])
        send(lane, 0).start()
    lax.fori_loop(1, hops, take_hop, None)
    last = (hops - 1) % _SLOTS
    for lane in range(2):
        send(lane, last).wait_recv()
        multiply_part(lane, hops, out.at[lane], arrived.at[lane, last])
    for lane in range(2):
        for hop in range(max(hops - _SLOTS, 0), hops):
            send(lane, hop % _SLOTS).wait_send()
