"""Go through a schedule's ticks on the devices: its tables as what a scan goes over."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from txcore.parallel.pipeline.buffers import Buffers
from txcore.parallel.pipeline.schedule import Schedule
from txcore.parallel.pipeline.slots import (
    IDLE,
    Slots,
    shift_activations,
    shift_cotangents,
    used_ticks,
)


class Row(NamedTuple):
    """Hold what a device does at a tick in one kind of pass: int32 scalars, -1 for nothing.

    Attributes:
      microbatch: which.
      chunk: which of its chunks.
      activations: the slot of each buffer that holds what belongs to it; -1 for none.
      stash: as above.
      cotangents: as above.
      held: as above.
    """

    microbatch: Any
    chunk: Any
    activations: Any
    stash: Any
    cotangents: Any
    held: Any


def make_rows(schedule: Schedule, buffers: Buffers, device: Any) -> dict[str, Row]:
    """Return a device's rows, int32 [ticks]: of each kind of pass ("F", "B", "W"), and of what
    arrives from the stage before ("F in") and from that after ("B in").
    """
    slots = {
        "F": schedule.forward,
        "B": schedule.backward,
        "W": schedule.weight,
        "F in": shift_activations(schedule.forward, schedule.chunks),
        "B in": shift_cotangents(schedule.backward),
    }
    made = {kind: _look_up(one, buffers) for kind, one in slots.items()}
    tables = np.stack([table[: schedule.ticks] for row in made.values() for table in row])
    # One table of int32: what a device reads of it is all that differs between devices.
    mine = lax.dynamic_index_in_dim(jnp.asarray(tables), device, axis=2, keepdims=False)
    width = len(Row._fields)
    return {kind: Row(*mine[i * width : (i + 1) * width]) for i, kind in enumerate(made)}


def _look_up(slots: Slots, buffers: Buffers) -> Row:
    names = Row._fields[2:]
    return Row(*slots, *(getattr(buffers, name).look_up(slots) for name in names))


class Segment(NamedTuple):
    """Hold some ticks that are one loop.

    Attributes:
      ticks: which.
      kinds: the kinds of passes in them: letters of "FBW".
      sends: the kinds whose results anybody uses that receives them: letters of "FB".
    """

    ticks: range
    kinds: str
    sends: str


def cut_ticks(schedule: Schedule) -> Iterator[Segment]:
    """Cut the ticks where a kind of pass begins or ends.

    So the program of the first ticks has no backward pass in it, and that of the last no forward
    pass. Where nobody uses what is sent nothing is: the compiler would drop it from a loop of one
    tick.

    Example:
      >>> from txcore.parallel.pipeline.ticks import cut_ticks
      >>> for segment in cut_ticks(tx.pipeline.make_schedule("1f1b", stages=2, microbatches=8)):
      ...     print(segment.ticks, segment.kinds, segment.sends or "nothing")
      range(0, 1) F F
      range(1, 9) FB FB
      range(9, 10) B nothing
    """
    spans = {
        "F": used_ticks(schedule.forward),
        "B": used_ticks(schedule.backward),
        "W": used_ticks(schedule.weight),
    }
    arrivals = {
        "F": shift_activations(schedule.forward, schedule.chunks),
        "B": shift_cotangents(schedule.backward),
    }
    edges = sorted({0, *(edge for span in spans.values() for edge in (span.start, span.stop))})
    for start, stop in itertools.pairwise(edges):
        kinds = "".join(kind for kind, span in spans.items() if start in span)
        later = {kind: slots.microbatch[start + 1 : stop + 1] for kind, slots in arrivals.items()}
        used = [kind for kind in later if kind in kinds and (later[kind] != IDLE).any()]
        yield Segment(range(start, stop), kinds, "".join(used))


def slice_rows(rows: dict[str, Row], ticks: range) -> dict[str, Row]:
    """Return the rows of some ticks."""
    return jax.tree.map(lambda table: table[ticks.start : ticks.stop], rows)


def read_slot(buffers: Any, slot: Any) -> Any:
    """Return what stands in a slot of each array of a tree, dim 0 being that of the slots."""
    index = jnp.maximum(slot, 0)
    return jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, index, keepdims=False), buffers)


def write_slot(buffers: Any, slot: Any, values: Any) -> Any:
    """Return the buffers with `values` in a slot; unchanged where it is -1."""
    index = jnp.maximum(slot, 0)

    def write_one(buffer: jax.Array, value: jax.Array) -> jax.Array:
        # The slot alone is read back: to choose between whole buffers would copy them.
        old = lax.dynamic_index_in_dim(buffer, index, keepdims=False)
        return lax.dynamic_update_index_in_dim(buffer, jnp.where(slot >= 0, value, old), index, 0)

    return jax.tree.map(write_one, buffers, values)
