"""The bodies of the two Pallas kernels that pack and unpack on a TPU."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from txcore.kernels.bucket.mosaic_copies import (
    LANES,
    SLOTS,
    TILE,
    list_pipe_scratch,
    slice_tiles,
    take_first,
    take_pipe,
    turn_elements,
)

Convert = Callable[[jax.Array], jax.Array]  # to the wide dtype, scaled


@dataclass(frozen=True)
class Layout:
    """Hold where arrays lie in a buffer.

    Attributes:
      starts, sizes: of each array, in elements; none is empty.
      piece: elements that pass at a time, whole tiles.
    """

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    piece: int

    @property
    def size(self) -> int:
        """Elements of the buffer."""
        return self.starts[-1] + self.sizes[-1]


def list_pack_scratch(
    layout: Layout, sources: Sequence[Any], targets: Sequence[Any], wide: Any
) -> list[Any]:
    """List the scratch arrays of `pack` for operands and results of these dtypes."""
    from jax.experimental.pallas import tpu

    ends = zip(layout.sizes, sources, strict=True)
    return [
        *list_pipe_scratch(layout.piece, sources, targets),
        *(tpu.VMEM((size % TILE or TILE,), dtype) for size, dtype in ends),
        *(tpu.VMEM((TILE,), dtype) for dtype in dict.fromkeys(sources)),
        tpu.VMEM((layout.size % TILE or TILE,), targets[0]),
        tpu.VMEM((TILE // LANES, LANES), wide),
        tpu.SemaphoreType.DMA((len(layout.sizes) + 1,)),
    ]


def pack(
    layout: Layout, sources: Sequence[Any], targets: Sequence[Any], scratch: list[Any], to: Convert
) -> None:
    """Copy arrays one behind the other.

    The tile in which one array ends and the next begins is kept until it is full.
    """
    from jax.experimental.pallas import tpu

    (out,), piece = targets, layout.piece
    dtypes = [source.dtype for source in sources]
    pipe = take_pipe(piece, dtypes, [out.dtype], scratch)
    ends = [scratch.pop(0) for _ in sources]
    tiles = {dtype: scratch.pop(0) for dtype in dict.fromkeys(dtypes)}
    out_end, kept, semaphores = scratch

    def fetch_end(number: int) -> Any:
        size = layout.sizes[number]
        place = slice_tiles(size // TILE * TILE, size % TILE)
        return tpu.make_async_copy(sources[number].at[place], ends[number], semaphores.at[number])

    def fetch_rest(number: int) -> Any:
        first = layout.sizes[number] // piece * piece
        place = slice_tiles(first, layout.sizes[number] % piece // TILE * TILE)
        return pipe.fetch(number, SLOTS - 1, sources[number].at[place])

    def piece_of(number: int, index: Any) -> Any:
        return sources[number].at[slice_tiles(index * piece, piece)]

    def place_of(base: int, index: Any) -> Any:
        return out.at[slice_tiles(base + index * piece, piece)]

    def begin(number: int) -> None:
        if layout.sizes[number] >= piece:
            pipe.fetch(number, 0, piece_of(number, 0)).start()
        if layout.sizes[number] % piece >= TILE:
            fetch_rest(number).start()

    def fill(number: int, slot: Any, size: int) -> None:
        """Turn what arrived in a slot, and write it behind what is kept."""
        turn = layout.starts[number] % TILE
        turned = turn_elements(to(pipe.read(number, slot, dtypes[number], size)), turn)
        first = turned[: TILE // LANES]
        pipe.write(number, slot, out.dtype, take_first(turn, kept[...], first))
        if size > TILE:
            pipe.write(number, slot, out.dtype, turned[TILE // LANES :], TILE)
        kept[...] = first

    def finish(number: int, start: int, size: int) -> None:
        """Keep the end of an array that fills no tile, or send the tile that it fills."""
        fetch_end(number).wait()
        tile = tiles[dtypes[number]]
        tile[0:size] = ends[number][...]
        turn = start % TILE
        turned = turn_elements(to(tile[...].reshape(-1, LANES)), turn)
        full = take_first(turn, kept[...], turned)
        kept[...] = full
        if turn + size >= TILE:
            pipe.wait_for_room(number)
            pipe.write(number, SLOTS - 1, out.dtype, full)
            pipe.send(number, out.at[slice_tiles(start - turn, TILE)])
            kept[...] = turned

    for tile in tiles.values():
        tile[...] = jnp.zeros(tile.shape, tile.dtype)
    kept[...] = jnp.zeros(kept.shape, kept.dtype)
    for number, size in enumerate(layout.sizes):
        if size % TILE:
            fetch_end(number).start()
    begin(0)
    for number, (start, size) in enumerate(zip(layout.starts, layout.sizes, strict=True)):
        base, whole = start // TILE * TILE, size // piece
        if number + 1 < len(sources):
            begin(number + 1)
        if whole:
            pipe.pass_pieces(
                *(number, whole),
                functools.partial(piece_of, number),
                functools.partial(place_of, base),
                functools.partial(fill, number, size=piece),
            )
        rest = size % piece // TILE * TILE
        if rest:
            fetch_rest(number).wait()
            pipe.wait_for_room(number)
            fill(number, SLOTS - 1, rest)
            pipe.send(number, out.at[slice_tiles(base + whole * piece, rest)])
        if size % TILE:
            finish(number, start + size // TILE * TILE, size % TILE)
    if layout.size % TILE:
        tile = next(iter(pipe.leaving.values()))
        pipe.finish()
        tile[0:TILE] = kept[...].reshape(-1).astype(out.dtype)
        out_end[...] = tile[0 : layout.size % TILE]
        place = slice_tiles(layout.size // TILE * TILE, layout.size % TILE)
        last = tpu.make_async_copy(out_end, out.at[place], semaphores.at[len(sources)])
        last.start()
        last.wait()
    pipe.finish()


@dataclass(frozen=True)
class _Rest:
    """Hold what is left of an array behind its whole pieces.

    Attributes:
      pieces: how many whole ones there are.
      base, turn: the tile of the buffer in which the array begins, and where in it.
      size: elements that are left.
      tiled: elements of whole tiles that are read for them.
      total: the same with the buffer's last tile, if it is cut off and needed.
    """

    pieces: int
    base: int
    turn: int
    size: int
    tiled: int
    total: int


def _rest_of(layout: Layout, number: int) -> _Rest:
    start, size, piece = layout.starts[number], layout.sizes[number], layout.piece
    turn = start % TILE
    base, end = start - turn, layout.size // TILE * TILE
    # A piece is read with the tile behind it, which must be whole.
    pieces = max(0, min(size // piece, (end - base - (TILE if turn else 0)) // piece))
    left = size - pieces * piece
    total = -(-(turn + left) // TILE) * TILE if left else 0
    return _Rest(pieces, base, turn, left, min(total, end - base - pieces * piece), total)


def list_unpack_scratch(
    layout: Layout, sources: Sequence[Any], targets: Sequence[Any], wide: Any
) -> list[Any]:
    """List the scratch arrays of `unpack` for operands and results of these dtypes."""
    from jax.experimental.pallas import tpu

    ends = zip(layout.sizes, targets, strict=True)
    return [
        *list_pipe_scratch(_unpack_room(layout), sources, targets),
        tpu.VMEM((layout.size % TILE or TILE,), sources[0]),
        *(tpu.VMEM((size % TILE or TILE,), dtype) for size, dtype in ends),
        tpu.SemaphoreType.DMA((len(layout.sizes) + 1,)),
    ]


def _unpack_room(layout: Layout) -> int:
    return layout.piece + 3 * TILE


def unpack(
    layout: Layout, sources: Sequence[Any], targets: Sequence[Any], scratch: list[Any], to: Convert
) -> None:
    """Copy each array out of a buffer."""
    from jax.experimental.pallas import tpu

    (flat,), piece = sources, layout.piece
    dtypes = [target.dtype for target in targets]
    room = _unpack_room(layout)
    pipe = take_pipe(room, [flat.dtype], dtypes, scratch)
    flat_end, *ends, semaphores = scratch
    rests = [_rest_of(layout, number) for number in range(len(targets))]
    end = layout.size // TILE * TILE

    def piece_of(number: int, index: Any) -> Any:
        more = TILE if rests[number].turn else 0
        return flat.at[slice_tiles(rests[number].base + index * piece, piece + more)]

    def target_of(number: int, index: Any) -> Any:
        return targets[number].at[slice_tiles(index * piece, piece)]

    def fetch_rest(number: int) -> Any:
        first = rests[number].base + rests[number].pieces * piece
        return pipe.fetch(number, SLOTS - 1, flat.at[slice_tiles(first, rests[number].tiled)])

    def begin(number: int) -> None:
        if rests[number].pieces:
            pipe.fetch(number, 0, piece_of(number, 0)).start()
        if rests[number].tiled:
            fetch_rest(number).start()

    def take(number: int, slot: Any, read: int, size: int) -> None:
        """Turn what arrived in a slot back, and write as many elements, in whole tiles."""
        arrived = to(pipe.read(number, slot, flat.dtype, read))
        turned = turn_elements(arrived, -rests[number].turn)
        pipe.write(number, slot, dtypes[number], turned[: -(-size // TILE) * (TILE // LANES)])

    def send_rest(number: int) -> None:
        rest, target = rests[number], targets[number]
        if rest.tiled:
            fetch_rest(number).wait()
        if rest.total > rest.tiled:
            pipe.put(number, flat.dtype, flat_end[...], rest.tiled)
        pipe.wait_for_room(number)
        take(number, SLOTS - 1, rest.total, rest.size)
        first, whole = rest.pieces * piece, rest.size // TILE * TILE
        if rest.size > whole:
            ends[number][...] = pipe.take(number, dtypes[number], whole, rest.size - whole)
            place = slice_tiles(first + whole, rest.size - whole)
            copy = tpu.make_async_copy(ends[number], target.at[place], semaphores.at[number])
            copy.start()
            sent.append(copy)
        if whole:
            pipe.send(number, target.at[slice_tiles(first, whole)])

    sent: list[Any] = []
    if layout.size % TILE:
        place = slice_tiles(end, layout.size % TILE)
        copy = tpu.make_async_copy(flat.at[place], flat_end, semaphores.at[len(targets)])
        copy.start()
        copy.wait()
    begin(0)
    for number, rest in enumerate(rests):
        if number + 1 < len(targets):
            begin(number + 1)
        if rest.pieces:
            pipe.pass_pieces(
                *(number, rest.pieces),
                functools.partial(piece_of, number),
                functools.partial(target_of, number),
                functools.partial(
                    take, number, read=piece + (TILE if rest.turn else 0), size=piece
                ),
            )
        if rest.size:
            send_rest(number)
    for copy in sent:
        copy.wait()
    pipe.finish()
