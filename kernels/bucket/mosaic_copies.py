"""Copies between arrays and a flat buffer, for the body of a Pallas kernel on TPU.

An array begins somewhere in a tile of 1024 elements of the buffer. So pieces of it are turned in
vector memory, (rows, 128), by as many elements. `Pipe` lets them pass: the next piece arrives and
the last one leaves meanwhile, and the first ones of the next array.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LANES = 128
TILE = 1024  # elements that lie together in a TPU's memory
SLOTS = 3  # of an array in a pipe: two for its pieces, one for what is left of it


def turn_elements(x: jax.Array, by: int) -> jax.Array:
    """Return what `jnp.roll` makes of the flat elements of (rows, 128)."""
    from jax.experimental.pallas import tpu

    rows, lanes = divmod(by % x.size, LANES)
    x = tpu.roll(x, lanes, 1) if lanes else x
    here = tpu.roll(x, rows, 0) if rows else x
    if not lanes:
        return here
    after = tpu.roll(x, (rows + 1) % x.shape[0], 0)
    return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 1) >= lanes, here, after)


def take_first(count: int, first: jax.Array, other: jax.Array) -> jax.Array:
    """Return the first flat elements of one tile, and the others of another."""
    row, lane = (lax.broadcasted_iota(jnp.int32, first.shape, dim) for dim in (0, 1))
    return jnp.where(row * LANES + lane < count, first, other)


def slice_tiles(start: Any, size: int) -> Any:
    """Return a slice that starts at a tile."""
    from jax.experimental import pallas as pl

    return pl.ds(pl.multiple_of(start, TILE) if not isinstance(start, int) else start, size)


@dataclass
class Pipe:
    """Let pieces of arrays pass vector memory.

    Attributes:
      room: elements of a slot, whole tiles.
      arriving, leaving: references to `2 * SLOTS * room` elements by dtype: slots for an array and
        for the next one.
      arrived, left: references to as many semaphores.
    """

    room: int
    arriving: dict[Any, Any]
    leaving: dict[Any, Any]
    arrived: Any
    left: Any
    _pending: dict[int, Any] = field(default_factory=dict)

    def fetch(self, number: int, slot: Any, source: Any) -> Any:
        """Describe the copy of a piece of an array into a slot."""
        return self._copy(number, slot, source, arrives=True)

    def read(self, number: int, slot: Any, dtype: Any, size: int) -> jax.Array:
        """Return what has arrived in a slot, as (rows, 128)."""
        at = self._place(number, slot) * self.room
        return self.arriving[dtype][slice_tiles(at, size)].reshape(-1, LANES)

    def write(self, number: int, slot: Any, dtype: Any, x: jax.Array, start: int = 0) -> None:
        """Put (rows, 128) into a slot that leaves, behind what begins it."""
        at = self._place(number, slot) * self.room + start
        self.leaving[dtype][slice_tiles(at, x.size)] = x.reshape(-1).astype(dtype)

    def put(self, number: int, dtype: Any, x: jax.Array, start: int) -> None:
        """Put flat elements into the last slot of what arrived, behind what begins it."""
        at = self._place(number, SLOTS - 1) * self.room + start
        self.arriving[dtype][at : at + x.size] = x

    def take(self, number: int, dtype: Any, start: int, size: int) -> jax.Array:
        """Return flat elements of the last slot that leaves, as it was written."""
        at = self._place(number, SLOTS - 1) * self.room + start
        return self.leaving[dtype][at : at + size]

    def send(self, number: int, target: Any) -> None:
        """Let the last slot of an array leave."""
        copy = self._copy(number, SLOTS - 1, target, arrives=False)
        copy.start()
        self._pending[self._place(number, SLOTS - 1)] = copy

    def wait_for_room(self, number: int, slot: int = SLOTS - 1) -> None:
        """Wait until a slot has left, if it was sent."""
        copy = self._pending.pop(self._place(number, slot), None)
        if copy is not None:
            copy.wait()

    def finish(self) -> None:
        """Wait for all that leaves."""
        for copy in self._pending.values():
            copy.wait()
        self._pending.clear()

    def pass_pieces(
        self,
        number: int,
        count: int,
        source: Callable[[Any], Any],
        target: Callable[[Any], Any],
        compute: Callable[[Any], None],
    ) -> None:
        """Let the pieces of an array pass, of which the first is on its way.

        Args:
          number: of the array.
          count: of its pieces.
          source, target: piece -> where it comes from, and goes to.
          compute: slot -> reads what arrived there, and writes what leaves.
        """
        from jax.experimental import pallas as pl

        def pass_piece(piece: Any, carry: None) -> None:
            slot = lax.rem(piece, 2)
            self.fetch(number, slot, source(piece)).wait()

            @pl.when(piece + 1 < count)
            def _() -> None:
                self.fetch(number, 1 - slot, source(piece + 1)).start()

            leaves = self._copy(number, slot, target(piece), arrives=False)
            pl.when(piece >= 2)(leaves.wait)  # for the one before, of the same size
            compute(slot)
            leaves.start()

        for slot in range(min(count, 2)):
            self.wait_for_room(number, slot)
        lax.fori_loop(0, count, pass_piece, None)
        for piece in range(max(count - 2, 0), count):
            copy = self._copy(number, piece % 2, target(piece), arrives=False)
            self._pending[self._place(number, piece % 2)] = copy

    def _place(self, number: int, slot: Any) -> Any:
        return number % 2 * SLOTS + slot

    def _copy(self, number: int, slot: Any, outside: Any, *, arrives: bool) -> Any:
        from jax.experimental.pallas import tpu

        place = self._place(number, slot)
        buffer = (self.arriving if arrives else self.leaving)[outside.dtype]
        inside = buffer.at[slice_tiles(place * self.room, outside.shape[0])]
        if arrives:
            return tpu.make_async_copy(outside, inside, self.arrived.at[place])
        return tpu.make_async_copy(inside, outside, self.left.at[place])


def list_pipe_scratch(room: int, sources: Sequence[Any], targets: Sequence[Any]) -> list[Any]:
    """List the scratch arrays of a pipe between arrays of these dtypes; `take_pipe` takes them."""
    from jax.experimental.pallas import tpu

    size = 2 * SLOTS * room
    buffers = [tpu.VMEM((size,), d) for some in (sources, targets) for d in dict.fromkeys(some)]
    return [*buffers, *[tpu.SemaphoreType.DMA((2 * SLOTS,))] * 2]


def take_pipe(
    room: int, sources: Sequence[Any], targets: Sequence[Any], scratch: list[Any]
) -> Pipe:
    """Return a pipe of the first scratch arrays, which it takes from the list."""
    arriving = {dtype: scratch.pop(0) for dtype in dict.fromkeys(sources)}
    leaving = {dtype: scratch.pop(0) for dtype in dict.fromkeys(targets)}
    return Pipe(room, arriving, leaving, scratch.pop(0), scratch.pop(0))
