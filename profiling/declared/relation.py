"""Relate a value to one mesh axis: bits that a walk joins with `|` where values meet.

A value with no bit other than SLICED is zero on every device. A value without `DIFFERS` and
`UNKNOWN` is equal on all devices along the axis, whatever its jax type is.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from txcore.profiling.declared.equations import ADDITIVE, MOVES, NOT_LINEAR, PRODUCTS, VARYING_CASTS

CONSTANT = 1  # not zero, and written into the program
DEPENDS = 2  # made of the program's inputs
GATHERED = 4  # made from an all_gather along the axis
DIFFERS = 8  # made of what differs along the axis
UNKNOWN = 16  # of an operation that is not followed: it may differ
SLICED = 32  # made of what a loop goes over or carries
ASKED = 64  # cast by tx.vary just before: a sum of it is meant
# Of gradients. A local loss's gradient on one device is that of the sum of all devices' losses,
# so that the mean over the devices is the gradient of the mean loss.
SUMMED = 128  # autodiff summed it over the devices, as the gradient of something equal needs
TOTAL = 256  # the same, and nothing has divided it by their number yet
MULTIPLIED = 512  # holds the gradient of an equal loss once for each device
PART = 1024  # of a loss that is reduced already: the gradient is the sum of the parts, no mean
HOLDS_SUM = 2048  # a term of it is a sum over the axis that the program asked for, with factor 1

Relation = int

_OF_GRADIENTS = SUMMED | TOTAL | MULTIPLIED | PART
_ZERO_KEEPING = ADDITIVE | {"mul", *VARYING_CASTS}
_ASKED_KEEPING = MOVES | {"reduce_sum", "neg", *VARYING_CASTS}
# A sum over several dims may be one over examples: what it makes of a term is not known.
TERM_KEEPING = ADDITIVE - {"reduce_sum", "concatenate", "pad"} | {*VARYING_CASTS}


def may_differ(value: Relation) -> bool:
    """Tell whether a value is not known to be equal on all devices along the axis."""
    return bool(value & (DIFFERS | UNKNOWN))


def is_zero(value: Relation) -> bool:
    """Tell whether a value is known to be zero on every device."""
    return not value & ~SLICED


def join_relations(a: Relation, b: Relation) -> Relation:
    """Return the relation of a value that may be either of two.

    It holds a sum only where both do: two conds with one predicate may add up in one branch alone.
    """
    both = a | b
    certain = all(value & HOLDS_SUM or is_zero(value) for value in (a, b))
    return both if certain else both & ~HOLDS_SUM


def after_choice(value: Relation, predicate: Relation) -> Relation:
    """Return the relation of a value that a cond's or while's predicate has chosen."""
    return value | predicate & (CONSTANT | DEPENDS | DIFFERS | UNKNOWN | SLICED)


def inside_loop(value: Relation) -> Relation:
    """Return the relation of a loop's carry, or of one slice of what it goes over.

    A carry keeps its type, so a cast of it does not ask for a sum of equal values.
    """
    return (value | SLICED) & ~ASKED


def after_leaving(value: Relation, loop_inputs: Sequence[Relation] | None) -> Relation:
    """Return the relation of a call's or loop's result, as seen outside.

    Args:
      value: its relation inside.
      loop_inputs: the relations of a loop's inputs: its results are sliced where they are. None
        for a call.
    """
    value &= ~ASKED
    if loop_inputs is None:
        return value
    sliced = 0
    for given in loop_inputs:
        sliced |= given & SLICED
    return value & ~SLICED | sliced


def of_literal(value: Any) -> Relation:
    """Return the relation of a constant that is written into an equation."""
    return CONSTANT if np.any(np.asarray(value) != 0) else 0


def after_operation(name: str, inputs: list[Relation]) -> Relation:
    """Return the relation of the result of an operation that does not communicate."""
    value = 0
    for one in inputs:
        value |= one
    if value & ASKED and name not in _ASKED_KEEPING:
        value &= ~ASKED
    if name == "mul" and any(map(is_zero, inputs)):
        return value & SLICED
    return value | CONSTANT if is_zero(value) and name not in _ZERO_KEEPING else value


def after_use(name: str, inputs: list[Relation], value: Relation) -> Relation:
    """Return the relation of the result when the user's own operation takes gradients.

    Args:
      name: the operation.
      inputs: the relations of its inputs, gradients among them.
      value: the relation of its result by `after`.
    """
    if (
        value & SUMMED
        and may_differ(value)
        and not any(v & SUMMED and may_differ(v) for v in inputs)
    ):
        # A device's own part of a whole gradient, or the gradient times something of its own.
        value &= ~(SUMMED | PART)
    squared = name in PRODUCTS and sum(bool(one & PART) for one in inputs) > 1
    return value & ~PART if squared or name in NOT_LINEAR else value


def after_sum(value: Relation) -> Relation:
    """Return the relation of a reduction over the axis that the program itself asks for."""
    return value & (CONSTANT | DEPENDS | SLICED)


def after_all_reduced_sum(value: Relation) -> Relation:
    """Return the relation of a psum over the axis that the program itself asks for."""
    return after_sum(value) | (HOLDS_SUM if value & DEPENDS else 0)


def after_sum_of_cotangents(value: Relation, *, divided: bool, scatters: bool) -> Relation:
    """Return the relation of a sum that autodiff makes: the transpose of a cast or of a gather.

    Args:
      value: that of the cotangent.
      divided: whether the sum is divided by the number of devices.
      scatters: whether each device keeps a part of the sum alone.
    """
    if is_zero(value):
        return value
    equal = not may_differ(value)
    kept = value & (CONSTANT | DEPENDS | SLICED | PART | MULTIPLIED)
    if equal and not value & PART:
        kept |= MULTIPLIED
    if scatters:
        return kept | DIFFERS
    return kept | SUMMED | (0 if divided or value & PART else TOTAL)


def after_crossing(value: Relation, transposed: str | None) -> Relation:
    """Return the relation of a cotangent that is cast to varying in a backward pass.

    Args:
      value: that of the cotangent, which is not zero.
      transposed: the collective whose transpose the cast is, "" if it is none, None if unknown.
    """
    if transposed == "" or (value & SUMMED and value & DIFFERS):
        return value  # what differs came to it after the sum, where jax took it for equal
    if value & SUMMED and not value & PART:
        return value & ~(SUMMED | TOTAL)
    value &= ~SUMMED
    return value if transposed is None else value | PART


def after_gather(value: Relation) -> Relation:
    """Return the relation of what was gathered along the axis."""
    return value & (CONSTANT | DEPENDS | SLICED | TOTAL) | (0 if is_zero(value) else GATHERED)


def after_gather_of_cotangents(value: Relation) -> Relation:
    """Return the relation of a gather that autodiff makes: the transpose of a reduce-scatter.

    As of the cast that is the transpose of a psum: each device has the gradient of its own term.
    """
    if is_zero(value):
        return value
    kept = after_crossing(value, "reduce_scatter")
    return kept & (CONSTANT | DEPENDS | SLICED | _OF_GRADIENTS) | GATHERED


def after_exchange(value: Relation) -> Relation:
    """Return the relation of a value that each device received, or of its part of a sum."""
    return value & (CONSTANT | DEPENDS | SLICED | _OF_GRADIENTS) | DIFFERS
