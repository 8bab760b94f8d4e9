"""A device's two neighbours on the ring of a mesh axis: meet them, copy to them, grant them room.

Inside of Pallas TPU kernels. A direction is +1, to the next device along the axis, or -1.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax import lax

DIRECTIONS = (1, -1)


class Ring(NamedTuple):
    """Hold a ring as a device of it sees it.

    Attributes:
      axis: its mesh axis.
      size: its devices.
      place: this device's place along each axis of the mesh.
    """

    axis: str
    size: int
    place: Mapping[str, jax.Array]


def place_of(ring: Ring, by: Any) -> jax.Array:
    """Return the place on the ring of the device `by` places from here, a round at most."""
    return lax.rem(ring.place[ring.axis] + by + ring.size, ring.size)


def neighbour(ring: Ring, by: int) -> dict[str, jax.Array]:
    """Return the device id of a device of the ring."""
    return {**ring.place, ring.axis: place_of(ring, by)}


def meet_neighbours(ring: Ring) -> None:
    """Wait until both neighbours are in this kernel, so that its buffers are theirs to write to."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    barrier = pltpu.get_barrier_semaphore()
    for by in DIRECTIONS:
        pl.semaphore_signal(barrier, 1, device_id=neighbour(ring, by))
    pl.semaphore_wait(barrier, len(DIRECTIONS))


def copy_to_neighbour(
    source: Any, target: Any, sent: Any, received: Any, ring: Ring, by: int
) -> Any:
    """Describe the copy of a reference here to one of a neighbour's."""
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.make_async_remote_copy(
        source, target, send_sem=sent, recv_sem=received, device_id=neighbour(ring, by)
    )


def grant_room(credit: Any, ring: Ring, by: int) -> None:
    """Tell the neighbour that writes here that one more slot is free."""
    from jax.experimental import pallas as pl

    pl.semaphore_signal(credit, 1, device_id=neighbour(ring, by))


def take_room(credit: Any) -> None:
    """Wait until the neighbour that is written to has one more slot free."""
    from jax.experimental import pallas as pl

    pl.semaphore_wait(credit, 1)
