"""A pipeline's stages: the user's functions, checked, with the types of what they return."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from txcore import _compat
from txcore.collectives import _leaves, vary
from txcore.parallel.pipeline.inputs import Inputs
from txcore.parallel.pipeline.means import Means

Function = Callable[..., Any]

# XLA's permutes have no groups of devices: all devices of the program have to reach them.
_PERMUTES = ("ppermute", "psend", "precv")


@dataclass(frozen=True)
class Stages:
    """Hold a pipeline's functions; what they return varies along the pipe axis.

    Attributes:
      first: `first(ends, microbatch) -> x`.
      block: `block(chunk, x, microbatch, stage) -> x`.
      last: `last(ends, x, microbatch, mask) -> (loss, aux)`, a microbatch's part of the means.
      x: zeros of the type of what goes from stage to stage.
      means: zeros of the type of what `last` returns.
      skips: whether a device skips what is not its turn. With a permute inside of a stage all
        devices have to reach that: each computes at every tick, and drops what is not its turn.
    """

    first: Function
    block: Function
    last: Function
    x: Any
    means: Any
    skips: bool

    def run_if(
        self, turn: Any, run: Function, otherwise: Function, buffers: tuple[str, ...] = ()
    ) -> Any:
        """Return `run()` where it is this device's turn, else `otherwise()` of the same type.

        Args:
          turn: bool scalar.
          run: without arguments.
          otherwise: without arguments.
          buffers: keys of what `run` returns unchanged where it is not the device's turn.
        """
        if self.skips:
            return lax.cond(turn, run, otherwise)
        made, kept = run(), otherwise()
        # Not a product: what a stage makes of zeros may be NaN, and 0 * NaN is NaN.
        chosen = jax.tree.map(lambda new, old: jnp.where(turn, new, old), made, kept)
        # To choose between whole buffers would copy them.
        return {**chosen, **{name: made[name] for name in buffers}} if buffers else chosen


def prepare_stages(
    op: str, functions: tuple[Function, Function, Function], inputs: Inputs, *, has_aux: bool
) -> Stages:
    """Trace each function once; refuse what does not fit together.

    Raises:
      ValueError: what goes from stage to stage changes its type, a stage communicates over the
        pipe axis, or the losses are reduced already.
      TypeError: the losses are no arrays of floating point, one for each example.
    """
    first, block, last = functions
    axis = inputs.axes[0]
    microbatch = jax.tree.map(lambda leaf: leaf[0], inputs.batch)
    mask = None if inputs.mask is None else inputs.mask[0]
    chunk = jax.tree.map(lambda leaf: leaf[0], inputs.blocks)

    average = make_average(last, inputs.means, has_aux=has_aux)

    started = _trace_function(op, "first", axis, first, inputs.ends, microbatch)
    x = make_zeros(started.types, {axis})
    went_on = _trace_function(op, "block", axis, block, chunk, x, microbatch, inputs.stage)
    _check_same_type(op, started.types, went_on.types)
    axes = jax.tree.map(
        lambda *types: frozenset({axis}).union(*map(_compat.varying_axes_of, types)),
        *(started.types, went_on.types),
    )
    x = jax.tree.map(make_zeros, started.types, axes)
    ended = _trace_function(op, "last", axis, average, inputs.ends, x, microbatch, mask)
    along_pipe = jax.tree.map(lambda _: frozenset({axis}), ended.types)
    return Stages(
        first=lambda *args: _set_type(first(*args), axes),
        block=lambda *args: _set_type(block(*args), axes),
        last=lambda *args: _set_type(average(*args), along_pipe),
        x=x,
        means=make_zeros(ended.types, {axis}),
        skips=not (started.permutes or went_on.permutes or ended.permutes),
    )


def make_average(last: Function, means: Means, *, has_aux: bool) -> Function:
    """Return `average(ends, x, microbatch, mask) -> (loss, aux)`, a microbatch's part of both."""

    def average(ends: Any, x: Any, microbatch: Any, mask: Any) -> Any:
        out = last(ends, x, microbatch)
        losses, aux = out if has_aux else (out, None)
        return means.take_losses(losses, mask), means.take_aux(aux, mask)

    return average


class _Traced(NamedTuple):
    types: Any
    permutes: bool


def _trace_function(op: str, what: str, axis: str, function: Function, *args: Any) -> _Traced:
    """Return the types of a function's results, and whether it permutes anything."""
    from txcore.profiling.declared import equations

    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    for eqn in _walk_equations(closed.jaxpr):
        name = equations.name_of(eqn)
        if name in equations.KIND_OF and axis in equations.axes_of(eqn.params):
            raise ValueError(
                f"tx.{op} needs {what} to communicate over other axes than {axis!r}, got {name} "
                "over it: the devices along it work on different microbatches"
            )
    types = jax.tree.unflatten(jax.tree.structure(shapes), closed.out_avals)
    return _Traced(types, equations.has_any(closed.jaxpr, _PERMUTES))


def _walk_equations(jaxpr: Any) -> Iterator[Any]:
    from txcore.profiling.declared.equations import sub_jaxprs

    for eqn in jaxpr.eqns:
        yield eqn
        for inner in sub_jaxprs(eqn):
            yield from _walk_equations(inner)


def make_zeros(types: Any, axes: Iterable[str], dims: tuple[int, ...] = ()) -> Any:
    """Return zeros of these types, with `dims` in front, which vary along `axes` too."""

    def make(aval: Any) -> jax.Array:
        every = tuple(sorted({*_compat.varying_axes_of(aval), *axes}))
        return _leaves.vary_leaf(jnp.zeros((*dims, *aval.shape), aval.dtype), every)

    return jax.tree.map(make, types)


def _set_type(tree: Any, axes: Any) -> Any:
    """Return a tree of strong types, each leaf varying along its `axes` too."""

    def set_one(x: Any, axes: frozenset[str]) -> Any:
        x = lax.convert_element_type(x, jnp.result_type(x))
        return vary(x, tuple(sorted(axes)), name="stage")

    return jax.tree.map(set_one, tree, axes)


def _check_same_type(op: str, first: Any, block: Any) -> None:
    def describe(types: Any) -> Any:
        return jax.tree.map(lambda t: f"{t.dtype}{list(t.shape)}", types)

    floating = all(jnp.issubdtype(t.dtype, jnp.floating) for t in jax.tree.leaves(first))
    if not floating or describe(first) != describe(block):
        raise ValueError(
            f"tx.{op} needs first and block to return floating-point arrays of one structure, "
            f"shape and dtype, since they go from stage to stage, got {describe(first)} of first "
            f"and {describe(block)} of block"
        )
