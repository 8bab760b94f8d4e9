"""Gradients of a batch in parts: a loop adds them up, and they are reduced once, after it.

Inside of the loop a loss is that of one part, the mean over its examples. The parts are of one
size, so that the mean over them is that over the batch, as the mean over devices is that over the
global one; a masked mean (`tx.example_mean`) is told how many examples all parts have.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from txcore import _compat, varying
from txcore.collectives import _leaves
from txcore.kernels.common import checks


class Asked(NamedTuple):
    """A count that a loss makes of one part: on this device, and how it becomes the global one."""

    local: jax.Array
    over_devices: Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Part:
    """State of which microbatch the code is that is traced now.

    Attributes:
      number: of microbatches.
      examples: of each, on this device.
      is_trial: whether it is traced to find out what is counted, and not to be run.
      asked: gets that.
      entered: jax's state of tracing where the loss begins; None where that does not matter.
      totals: else the counts of all microbatches, in the order in which they are asked for.
    """

    number: int
    examples: int
    is_trial: bool = False
    asked: list[Asked] = field(default_factory=list, compare=False)
    entered: Any = field(default=None, compare=False)
    totals: Iterator[jax.Array] = field(default=iter(()), compare=False)


_INSIDE = "inside of a function that jax traces by itself (jit, checkpoint, scan)"


@functools.cache
def _make_context() -> Any:
    """Return what knows the current part.

    jax keeps what it traces of an inner function: inside of another part it is traced anew. It is
    made when it is first entered, since making it lets jax forget all that it has traced.
    """
    return jax.make_user_context(None)


def current_part() -> Part | None:
    """Return of which microbatch the code is that is traced now; None outside of their loop."""
    if not _make_context.cache_info().currsize:
        return None
    part: Part | None = _make_context().value
    return part


def total_of(part: Part, asked: Asked) -> jax.Array:
    """Return the count of all microbatches of all devices, for a loss that counts those of one.

    Raises:
      ValueError: they were not counted before the loop.
    """
    if part.is_trial:
        from jax.extend.core import get_opaque_trace_state  # imports all of Pallas

        if part.entered is not None and part.entered != get_opaque_trace_state():
            raise _refuse_count(_INSIDE)
        part.asked.append(asked)
        return asked.over_devices(asked.local)
    total = next(part.totals, None)
    if total is None:
        raise _refuse_count(_INSIDE)
    return total


class Loop(NamedTuple):
    """State what the loop over microbatches does with the arguments of a loss; the rest is split.

    Attributes:
      number: of microbatches.
      whole: places of the arguments that each of them is given whole: those to differentiate.
      carry: place of the argument that is what the one before it returned as its aux; or None.
      has_aux: whether the loss returns (loss, aux).
      row_axes: over which the rows of what is split are, of more than one device.
    """

    number: int
    whole: frozenset[int]
    carry: int | None
    has_aux: bool
    row_axes: tuple[str, ...]


def accumulate(
    one: Callable[..., Any],
    loss: Callable[..., Any],
    loop: Loop,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Return the mean of the losses and of the gradients of a batch's parts.

    Args:
      one: `one(*args, **kwargs) -> (value, gradients)` of a part.
      loss: the function that it differentiates.
      loop: what is done with the arguments.
      args: those for the whole batch.
      kwargs: to be split.

    Returns:
      As `one` of the whole batch; an aux that is not carried is that of each part, with a dim
      more in front.

    Raises:
      ValueError: there is nothing to split, or not into so many parts; or something is counted in
        a part that cannot be counted before the loop.
    """
    if current_part() is not None:
        raise ValueError(
            "tx.value_and_grad needs one loop over microbatches, got microbatches= inside of "
            "another's: give one of them all parts"
        )
    fixed = {i: a for i, a in enumerate(args) if i in loop.whole}
    start = {} if loop.carry is None else {loop.carry: args[loop.carry]}
    batch = {i: a for i, a in enumerate(args) if i not in fixed and i not in start}, dict(kwargs)
    rows = _check_rows(batch, loop)
    parts = jax.tree.map(lambda x: _split_rows(x, loop.number), batch)
    first = jax.tree.map(lambda x: x[0], parts)
    size = loop.number, rows // loop.number

    def run(carried: Any, part: Any, where: Part) -> tuple[Any, Any, Any]:
        """Return what goes on to the next part, the value to keep, and the gradients."""
        with _make_context()(where):
            value, gradients = _call_with(one, {**fixed, **carried, **part[0]}, part[1])
        if loop.carry is None:
            return {}, value, gradients
        return {loop.carry: value[1]}, value[0], gradients

    trial = Part(*size, is_trial=True)
    types = jax.eval_shape(partial(run, where=trial), start, first)
    totals = _count_all_parts(loss, trial, {**fixed, **start}, parts) if trial.asked else []

    def add(total: Any, part: Any) -> tuple[Any, Any]:
        sums, carried = total
        carried, value, gradients = run(carried, part, Part(*size, totals=iter(totals)))
        return (jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, gradients), carried), value

    zeros = jax.tree.map(
        lambda g: _cast_like(jnp.zeros(g.shape, checks.accumulator_of(g)), g), types[2]
    )
    begun = zeros, jax.tree.map(_cast_like, start, types[0])
    (sums, carried), values = lax.scan(add, begun, parts)
    gradients = jax.tree.map(lambda s, g: (s / loop.number).astype(g.dtype), sums, types[2])
    if loop.carry is not None:
        return (_average_losses(values), carried[loop.carry]), gradients
    return (
        (_average_losses(values[0]), values[1]) if loop.has_aux else _average_losses(values)
    ), gradients


def _call_with(function: Callable[..., Any], places: Mapping[int, Any], named: Any) -> Any:
    return function(*(places[i] for i in sorted(places)), **named)


def _count_all_parts(
    loss: Callable[..., Any], trial: Part, fixed: Any, parts: Any
) -> list[jax.Array]:
    """Return what a loss counts in all parts of all devices, without computing the rest of it."""
    from jax.extend.core import ClosedJaxpr, get_opaque_trace_state, jaxpr_as_fun  # as above

    found: list[Asked] = []

    def count(fixed: Any, part: Any) -> list[jax.Array]:
        found.clear()
        with _make_context()(replace(trial, asked=found, entered=get_opaque_trace_state())):
            _call_with(loss, {**fixed, **part[0]}, part[1])
        return [asked.local for asked in found]

    first = jax.tree.map(lambda x: x[0], parts)
    traced = jax.make_jaxpr(count)(fixed, first)
    if len(found) != len(trial.asked):  # jax had traced it before
        raise _refuse_count(_INSIDE)
    needed = varying.inputs_needed_by(traced, [True] * len(traced.out_avals))[1]
    of_fixed = len(jax.tree.leaves(fixed))
    if any(needed[:of_fixed]):
        raise _refuse_count("by what it differentiates or carries from one to the next")
    counts = jaxpr_as_fun(ClosedJaxpr(_compat.live_jaxpr(traced.jaxpr), traced.consts))

    def of_part(part: Any) -> list[jax.Array]:
        leaves = jax.tree.leaves(part)
        return counts(*(x for x, own in zip(leaves, needed[of_fixed:], strict=True) if own))

    locals_ = [jnp.sum(x, 0, x.dtype) for x in jax.vmap(of_part)(parts)]
    return [one.over_devices(x) for one, x in zip(found, locals_, strict=True)]


def _refuse_count(how: str) -> ValueError:
    return ValueError(
        f"tx.example_mean counts the real examples of one microbatch, {how}, so that those of all "
        "cannot be counted before their loop, and the mean would be one of means. Take count = "
        "tx.psum(jnp.sum(mask), axis) of the whole batch's mask outside of the loss, and pass "
        "tx.example_mean(..., count=count)"
    )


def _check_rows(batch: Any, loop: Loop) -> int:
    """Return how many examples the arguments hold; refuse those that cannot be split."""
    rows: dict[int, str] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        where = _name_argument(path)
        shared = [a for a in loop.row_axes if _leaves.varies_along(leaf, a) is False]
        if shared or not np.shape(leaf):
            reason, remedy = "has no rows", ""
            if np.shape(leaf):
                reason = f"is the same along axis {shared[0]!r}"
                remedy = f". Rows that all devices have alike: tx.vary(x, {shared[0]!r})"
            raise ValueError(
                f"tx.value_and_grad(microbatches={loop.number}) splits all arguments that are not "
                f"differentiated, but {where}, {jax.typeof(leaf)}, {reason}: let the loss take "
                "what all examples share from outside (functools.partial), and what goes from one "
                f"microbatch to the next by carry={remedy}"
            )
        rows.setdefault(np.shape(leaf)[0], where)
    if not rows:
        raise ValueError(
            f"tx.value_and_grad(microbatches={loop.number}) needs an argument to split, got none "
            "but what is differentiated: give the loss the batch as an argument, "
            "value_and_grad(loss_of, microbatches=...)(state.params, batch)"
        )
    if len(rows) > 1:
        given = ", ".join(f"{count} in {where}" for count, where in rows.items())
        raise ValueError(
            f"tx.value_and_grad(microbatches={loop.number}) needs the same number of examples in "
            f"all that it splits, got {given}: let the loss take what is no part of the batch from "
            "outside (functools.partial)"
        )
    (count,) = rows
    if count == 0 or count % loop.number:
        raise ValueError(
            f"tx.value_and_grad needs microbatches= a divisor of the {count} examples of this "
            f"device, got {loop.number}: take another number of them or of examples, or pad the "
            "batch and mask the padding"
        )
    return count


def _name_argument(path: Any) -> str:
    """Return how a leaf of the arguments is called: those by place, then those by name."""
    return f"argument {path[1].key}{jax.tree_util.keystr(path[2:])}"


def _split_rows(x: Any, number: int) -> jax.Array:
    x = x if _compat.is_key_array(x) else jnp.asarray(x)
    return x.reshape(number, x.shape[0] // number, *x.shape[1:])


def _cast_like(x: Any, like: Any) -> jax.Array:
    """Return an array that varies along the axes of another, too."""
    x = x if _compat.is_key_array(x) else jnp.asarray(x)
    axes = _compat.varying_axes(like) - _compat.varying_axes(x)
    return _compat.cast_to_varying(x, tuple(sorted(axes))) if axes else x


def _average_losses(losses: jax.Array) -> jax.Array:
    return jnp.mean(losses, dtype=checks.accumulator_of(losses)).astype(losses.dtype)
