"""all_gather(x) @ w: each shard is multiplied while those behind it are on their way."""

from typing import Any

import jax
from jax import lax

from txcore.kernels.ring import neighbours
from txcore.kernels.ring.call import call_ring, ring_size
from txcore.kernels.ring.neighbours import Ring
from txcore.kernels.ring.product import accumulator, multiply


def gather_product(
    x: jax.Array, w: jax.Array, axis: str, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """Return the products (n, rows, columns) of all shards with w, and the shards themselves.

    Args:
      x: (rows, inner), this device's shard, of whole tiles.
      w: (inner, columns), of whole tiles, of x's dtype.
      axis: the mesh axis.
      interpret: as for `call_ring`.
    """
    from jax.experimental.pallas import tpu as pltpu

    size, columns = ring_size(axis), w.shape[1]
    semaphores = [pltpu.SemaphoreType.DMA((2, size // 2))] * 2
    products, shards = call_ring(
        _gather_and_multiply,
        axis,
        [x, w],
        [((size, x.shape[0], columns), x.dtype), ((size, *x.shape), x.dtype)],
        [accumulator(x, columns), *semaphores, pltpu.SemaphoreType.DMA],
        name="ring_all_gather_matmul",
        interpret=interpret,
        flops=2 * size * x.size * columns,
    )
    return products, shards


def _gather_and_multiply(
    ring: Ring,
    x: Any,
    w: Any,
    products: Any,
    shards: Any,
    total: Any,
    sent: Any,
    received: Any,
    copied: Any,
) -> None:
    from jax.experimental.pallas import tpu as pltpu

    steps = {1: ring.size // 2, -1: (ring.size - 1) // 2}

    def place(by: int, step: Any) -> Any:
        return neighbours.place_of(ring, -by * step)

    def send(by: int, step: Any, source: Any = None) -> Any:
        """Describe the copy onward of the shard from `step` places back."""
        lane, here = neighbours.DIRECTIONS.index(by), shards.at[place(by, step)]
        source = here if source is None else source
        semaphores = sent.at[lane, step], received.at[lane, step]
        return neighbours.copy_to_neighbour(source, here, *semaphores, ring, by)

    def multiply_shard(by: int, step: Any) -> None:
        multiply(shards.at[place(by, step)], w, products.at[place(by, step)], total)

    neighbours.meet_neighbours(ring)
    for by in steps:
        if steps[by]:
            send(by, 0, x).start()
    own = pltpu.make_async_copy(x, shards.at[place(1, 0)], copied)
    own.start()
    multiply(x, w, products.at[place(1, 0)], total)

    def pass_on(step: Any, carry: None) -> None:
        for by in steps:
            send(by, step - 1).wait_recv()
            send(by, step).start()
        for by in steps:
            multiply_shard(by, step)

    both = steps[-1]
    lax.fori_loop(1, max(both, 1), pass_on, None)
    is_even = steps[1] > both  # then one shard more comes from behind
    if both:
        for by in steps:
            send(by, both - 1).wait_recv()
        if is_even:
            send(1, both).start()
        for by in steps:
            multiply_shard(by, both)
    if is_even:
        send(1, both).wait_recv()
        multiply_shard(1, both + 1)
    for by in steps:
        lax.fori_loop(0, steps[by], lambda step, carry, by=by: send(by, step).wait_send(), None)
    own.wait()
