"""What the model's own layers send in a training step: the formula, beside the plan's."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import model

import txcore as tx
from txcore.parallel.pipeline.slots import used_ticks


class Sent(NamedTuple):
    """Arrays that the layers send.

    Attributes:
      what: the label of the collective's tag.
      kind: HLO's name of it.
      axis: the mesh axis.
      dtype: of what is sent.
      elements: of an array as it enters S: the whole of what is gathered or scattered.
      times: how often in a step.
    """

    what: str
    kind: str
    axis: str
    dtype: str
    elements: int
    times: int

    @property
    def payload_bytes(self) -> int:
        """Bytes of all of them."""
        return self.elements * self.times * jnp.dtype(self.dtype).itemsize


def activation(
    config: model.GPT, plan: tx.Plan, sizes: dict[str, int], rows: int, dtype: str = "float32"
) -> jax.ShapeDtypeStruct:
    """Return the type of what a stage hands to the next, of a global batch of so many rows."""
    microbatches = 1 if plan.pipeline is None else plan.pipeline.microbatches
    examples = rows // sizes["data"] // microbatches
    parts = sizes["context"] * (sizes["model"] if config.sequence else 1)
    return jax.ShapeDtypeStruct((examples, config.length // parts, config.width), dtype)


def predict(
    config: model.GPT, plan: tx.Plan, sizes: dict[str, int], rows: int, dtype: str = "float32"
) -> list[Sent]:
    """Return what the layers send in a step, on each device.

    Args:
      config: the model.
      plan: the plan; what it causes itself is `plan.predict`.
      sizes: the devices along each axis.
      rows: of the global batch.
      dtype: that the step computes in.
    """
    pipeline = plan.pipeline
    passes = pipeline.microbatches if pipeline is not None else 1
    chunks = pipeline.chunks if pipeline is not None else 1
    forward = backward = passes * chunks
    if pipeline is not None and sizes["pipe"] > 1:  # idle ticks send too, of zeros
        schedule = pipeline.make_schedule(sizes["pipe"])
        forward, backward = (
            len(used_ticks(slots)) for slots in (schedule.forward, schedule.backward)
        )
    layers = config.layers // (sizes["pipe"] * chunks)
    ends = passes if sizes["pipe"] == 1 else forward
    made = [
        *(_of_context(config, sizes, rows, dtype, plan) if sizes["context"] > 1 else ()),
        *(_of_model(config, sizes, rows, dtype, plan) if sizes["model"] > 1 else ()),
    ]
    # Of each layer, of a chunk of them, and of what stands before and after them.
    times = {"F": forward * layers, "B": backward * layers, "c": backward, "f": ends, "b": ends}
    return [
        Sent(what, kind, axis, name, elements, times[when] * n)
        for when, n, what, kind, axis, name, elements in made
    ]


def _of_model(
    config: model.GPT, sizes: dict[str, int], rows: int, dtype: str, plan: tx.Plan
) -> Iterator[tuple]:
    """Go over (when, how many, what, kind, axis, dtype, elements) of tensor parallelism."""
    own = activation(config, plan, sizes, rows, dtype)
    layers = config.layers // sizes["pipe"] // (plan.pipeline.chunks if plan.pipeline else 1)
    shards = sizes["model"] if config.sequence else 1
    tokens = own.shape[0] * own.shape[1] * shards
    x = ("model", dtype, tokens * config.width)
    if config.sequence:
        for name in ("qkv", "up"):
            yield "F", 1, name, "all-gather", *x
            yield "B", 1, name, "reduce-scatter", *x
        for name in ("out", "down"):
            yield "F", 1, name, "reduce-scatter", *x
            yield "B", 1, name, "all-gather", *x
        yield "f", 1, "embedding", "reduce-scatter", *x
        yield "b", 1, "embedding", "all-gather", *x
        yield "f", 1, "head", "all-gather", *x
        yield "b", 1, "head", "reduce-scatter", *x
        yield "c", 2, "norm", "all-reduce", "model", dtype, config.width * layers
        yield "b", 1, "norm", "all-reduce", "model", dtype, config.width
        if config.positions == "learned":
            elements = own.shape[1] * shards * config.width
            yield "b", 1, "positions", "all-reduce", "model", dtype, elements
    else:
        for name in ("out", "down"):
            yield "F", 1, name, "all-reduce", *x
        for name in ("qkv", "up"):
            yield "B", 1, name, "all-reduce", *x
        yield "f", 1, "embedding", "all-reduce", *x
        yield "b", 1, "head", "all-reduce", *x
    yield "f", 1, "cross_entropy.max", "all-reduce", "model", "float32", tokens
    yield "f", 1, "cross_entropy.sums", "all-reduce", "model", "float32", 2 * tokens


def _of_context(
    config: model.GPT, sizes: dict[str, int], rows: int, dtype: str, plan: tx.Plan
) -> Iterator[tuple]:
    """Go over what ring attention sends: keys and values, and their gradients."""
    examples = activation(config, plan, sizes, rows, dtype).shape[0]
    heads = config.kv_heads // sizes["model"]
    elements = math.prod((examples, config.length // sizes["context"], heads, config.features))
    hops = sizes["context"] - 1
    yield "F", 2 * hops, "ring_attention", "collective-permute", "context", dtype, elements
    back = ("ring_attention.backward", "collective-permute", "context")
    yield "B", 2 * hops, *back, dtype, elements
    yield "B", 2 * (hops + 1), *back, "float32", elements  # and home
