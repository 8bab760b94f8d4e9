"""What a device does at a tick: receive, a forward, a backward and a weight pass, and send."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from txcore.collectives import shift
from txcore.kernels.common.checks import accumulator
from txcore.parallel.pipeline.buffers import Buffer, Buffers
from txcore.parallel.pipeline.inputs import Inputs
from txcore.parallel.pipeline.programs import StageProgram
from txcore.parallel.pipeline.schedule import Schedule
from txcore.parallel.pipeline.stages import Stages, make_zeros
from txcore.parallel.pipeline.ticks import Row, Segment, read_slot, write_slot
from txcore.varying import match_varying

Carry = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """Hold what a pass works on.

    Attributes:
      is_mine: whether the device has anything to do.
      microbatch: the microbatch's part of the batch.
      mask: that of the mask, or None.
      chunk: the parameters of the chunk of layers.
      stage: the number of the virtual stage.
    """

    is_mine: Any
    microbatch: Any
    mask: Any
    chunk: Any
    stage: Any


def take_turn(inputs: Inputs, schedule: Schedule, row: Row) -> Turn:
    """Return what a row of the schedule names."""
    microbatch, mask = read_slot((inputs.batch, inputs.mask), row.microbatch)
    one = schedule.chunks == 1  # then the index is known: nothing is copied
    blocks = inputs.blocks
    chunk = jax.tree.map(lambda a: a[0], blocks) if one else read_slot(blocks, row.chunk)
    stage = jnp.maximum(row.chunk, 0) * schedule.stages + inputs.stage
    return Turn(row.microbatch >= 0, microbatch, mask, chunk, stage)


@dataclass(frozen=True)
class Runner:
    """Hold a pipeline that is to be differentiated.

    Attributes:
      schedule: which pass each device does at each tick.
      buffers: in which slot each value waits.
      inputs: parameters and batch.
      stages: the functions.
      program: a stage's passes.
      scale: what the loss is multiplied by before it is differentiated; None for nothing.
    """

    schedule: Schedule
    buffers: Buffers
    inputs: Inputs
    stages: Stages
    program: StageProgram
    scale: Any = None

    def start(self) -> Carry:
        """Return what goes from tick to tick: what was sent, the buffers, and the sums."""
        x, axes = self.stages.x, self.inputs.axes
        types = {name: [v.aval for v in getattr(self.program, name)] for name in ("stash", "held")}
        return {
            "activation": x,
            "cotangent": x,
            "activations": _make_buffer(self.buffers.activations, _types_of(x), axes),
            "cotangents": _make_buffer(self.buffers.cotangents, _types_of(x), axes),
            "stash": _make_buffer(self.buffers.stash, types["stash"], axes),
            "held": _make_buffer(self.buffers.held, types["held"], axes),
            "blocks": jax.tree.map(_make_sum, self.inputs.blocks),
            "ends": jax.tree.map(_make_sum, self.inputs.ends),
            "means": self.stages.means,
        }

    def tick(self, carry: Carry, rows: dict[str, Row], segment: Segment) -> Carry:
        """Do a tick of a segment."""
        carry, axis = dict(carry), self.inputs.axes[0]
        ring = self.schedule.chunks > 1  # the last stage's chunk is followed by the first's next
        if "F" in segment.kinds:
            slot = rows["F in"].activations
            carry["activations"] = write_slot(carry["activations"], slot, carry["activation"])
        if "B" in segment.kinds:
            slot = rows["B in"].cotangents
            carry["cotangents"] = write_slot(carry["cotangents"], slot, carry["cotangent"])
        if "F" in segment.kinds:
            carry |= self._forward(carry, rows["F"])
        if "F" in segment.sends:
            made = carry["activation"]
            carry["activation"] = shift(made, axis, 1, wrap=ring, name="activations")
        if "B" in segment.kinds:
            carry |= self._backward(carry, rows["B"])
        if "B" in segment.sends:
            made = carry["cotangent"]
            carry["cotangent"] = shift(made, axis, -1, wrap=ring, name="cotangents")
        if "W" in segment.kinds:
            carry |= self._weight(carry, rows["W"])
        return carry

    def _forward(self, carry: Carry, row: Row) -> Carry:
        turn = take_turn(self.inputs, self.schedule, row)
        is_last = turn.stage == self.schedule.stages * self.schedule.chunks - 1
        program, ends = self.program, self.inputs.ends
        sums = {name: carry[name] for name in ("ends", "means")}

        def run() -> Carry:
            x = self.stages.run_if(
                turn.stage == 0,
                lambda: self.stages.first(ends, turn.microbatch),
                lambda: read_slot(carry["activations"], row.activations),
            )
            given = {"chunk": turn.chunk, "microbatch": turn.microbatch, "stage": turn.stage}
            env = program.bind(**given, x=x)
            program.passes["F"].run(env)
            y = program.read(env, "y")
            loss = self.stages.run_if(
                is_last, lambda: self._take_loss(y, turn, sums), lambda: {"dy": y, **sums}
            )
            stash = write_slot(carry["stash"], row.stash, [env[v] for v in program.stash])
            return {"activation": y, "stash": stash, **loss}

        def wait() -> Carry:
            kept = {name: carry[name] for name in ("activation", "stash")}
            return {"dy": self.stages.x, **kept, **sums}

        made = self.stages.run_if(turn.is_mine, run, wait, buffers=("stash",))
        slot = jnp.where(turn.is_mine & is_last, row.cotangents, -1)
        made["cotangents"] = write_slot(carry["cotangents"], slot, made.pop("dy"))
        return made

    def _take_loss(self, y: Any, turn: Turn, sums: Carry) -> Carry:
        def mean_of(ends: Any, y: Any) -> Any:
            return self.stages.last(ends, y, turn.microbatch, turn.mask)

        loss, pull, aux = jax.vjp(mean_of, self.inputs.ends, y, has_aux=True)
        seed = jnp.ones_like(loss) if self.scale is None else jnp.asarray(self.scale, loss.dtype)
        grads, dy = pull(match_varying(seed, loss)[0])
        return {
            "dy": dy,
            "ends": jax.tree.map(_add_part, sums["ends"], grads),
            "means": jax.tree.map(jnp.add, sums["means"], (loss, aux)),
        }

    def _backward(self, carry: Carry, row: Row) -> Carry:
        turn = take_turn(self.inputs, self.schedule, row)
        program, ends = self.program, carry["ends"]

        def run() -> Carry:
            dy = read_slot(carry["cotangents"], row.cotangents)
            stash = read_slot(carry["stash"], row.stash)
            given = {"chunk": turn.chunk, "microbatch": turn.microbatch, "stage": turn.stage}
            env = program.bind(**given, dy=dy) | dict(zip(program.stash, stash, strict=True))
            program.passes["B"].run(env)
            dx = program.read(env, "dx")
            return {
                "cotangent": dx,
                "held": write_slot(carry["held"], row.held, [env[v] for v in program.held]),
                "blocks": self._add_gradient(carry["blocks"], row, env, late=False),
                "ends": self.stages.run_if(
                    turn.stage == 0, lambda: self._pull_first(ends, dx, turn), lambda: ends
                ),
            }

        def wait() -> Carry:
            return {name: carry[name] for name in ("cotangent", "held", "blocks", "ends")}

        return self.stages.run_if(turn.is_mine, run, wait, buffers=("held",))

    def _pull_first(self, ends: Any, dx: Any, turn: Turn) -> Any:
        """Add the gradient of the first function, which is computed anew: it is a look-up."""
        _, pull = jax.vjp(lambda e: self.stages.first(e, turn.microbatch), self.inputs.ends)
        return jax.tree.map(_add_part, ends, pull(dx)[0])

    def _weight(self, carry: Carry, row: Row) -> Carry:
        turn = take_turn(self.inputs, self.schedule, row)
        program = self.program

        def run() -> Any:
            kept = [*read_slot(carry["stash"], row.stash), *read_slot(carry["held"], row.held)]
            given = {"chunk": turn.chunk, "microbatch": turn.microbatch, "stage": turn.stage}
            names = (*program.stash, *program.held)
            env = program.bind(**given) | dict(zip(names, kept, strict=True))
            program.passes["W"].run(env)
            return self._add_gradient(carry["blocks"], row, env, late=True)

        return {"blocks": self.stages.run_if(turn.is_mine, run, lambda: carry["blocks"])}

    def _add_gradient(self, blocks: Any, row: Row, env: Any, *, late: bool) -> Any:
        leaves = jax.tree.leaves(blocks)
        treedef: Any = jax.tree.structure(blocks)
        grads = self.program.read_gradient(env, late)
        index = 0 if self.schedule.chunks == 1 else jnp.maximum(row.chunk, 0)
        for i, grad in enumerate(grads):
            if grad is not None:
                old = lax.dynamic_index_in_dim(leaves[i], index, keepdims=False)
                leaves[i] = lax.dynamic_update_index_in_dim(
                    leaves[i], _add_part(old, grad), index, 0
                )
        return treedef.unflatten(leaves)


def _add_part(total: jax.Array, part: jax.Array) -> jax.Array:
    return total + part.astype(total.dtype)


def _make_sum(leaf: jax.Array) -> jax.Array:
    """Return zeros to add gradients up in: of float32 or wider, since there are many."""
    zeros = jnp.zeros(leaf.shape, accumulator(leaf.dtype))
    return match_varying(zeros, leaf)[0]


def _types_of(tree: Any) -> Any:
    return jax.tree.map(jax.typeof, tree)


def _make_buffer(buffer: Buffer, types: Any, axes: tuple[str, ...]) -> Any:
    return make_zeros(types, axes[:1], (buffer.size,))
