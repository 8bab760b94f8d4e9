"""Compare a plan's prediction of a program's communication with an audit of it."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Protocol

import jax.numpy as jnp

from txcore.profiling.declared.collectives import Declared
from txcore.profiling.declared.gradient_factors import GradientFactor
from txcore.profiling.report import PlanLine, Report

GRADIENTS = "gradients"  # so a plan calls those whose mean it predicts


class Prediction(Protocol):
    """A plan's prediction of one step: arrays that a kind of collective sends over some axes."""

    @property
    def what(self) -> str:
        """Return what is sent ("gradients")."""

    @property
    def kind(self) -> str:
        """Return HLO's name of the collective ("all-reduce")."""

    @property
    def axes(self) -> tuple[str, ...]:
        """Return the mesh axes, all of them of more than one device."""

    @property
    def dtype(self) -> str:
        """Return jax's name of the dtype ("float32")."""

    @property
    def elements(self) -> tuple[int, ...]:
        """Return the elements of S of each array."""

    @property
    def at_most(self) -> bool:
        """Tell whether a program may do without some of them."""

    @property
    def per_microbatch(self) -> bool:
        """Tell whether a loop over microbatches is meant to send them in each trip."""

    @property
    def every(self) -> int:
        """Return in how many steps it is sent once."""


def against_plan(
    report: Report,
    predictions: Sequence[Prediction],
    factors: Sequence[GradientFactor] = (),
    *,
    steps: int = 1,
) -> Report:
    """Return a report that says, line by line, whether the program does what a plan predicts.

    A predicted array is found where the program declares a collective of its kind, dtype and
    size over its axes, together or one after the other, and maybe over more, whatever became of it
    in the compiled program. The remaining arrays are found in buckets, by their total.

    Args:
      report: an audit that was compared with the traced program.
      predictions: what the plan predicts of one step.
      factors: with which factor the program's gradients reach its parameters, where the plan
        predicts their mean.
      steps: how many steps the program makes in a loop: of what it declares inside, a step has
        one `steps`-th of the trips.

    Returns:
      The report with `plan`: a line for each prediction, then one for each tag (or primitive),
      kind, axes and dtype of what the program declares beyond them.

    Raises:
      ValueError: the report was not compared with a traced program.
    """
    if not report.checked:
        raise ValueError(
            "against_plan needs a report of a program that was traced, but got one with "
            "checked=False: audit the function itself, not what it was compiled to"
        )
    left = {
        i: _of_one_step(f.declared, steps)
        for i, f in enumerate(report.fates)
        if "missing" not in f.fates and (f.declared.live or f.declared.kind != "all-gather")
    }  # a gather whose result nobody uses is that of a view that is not looked at
    gone = {i for i in left if "eliminated" in report.fates[i].fates}
    lines = []
    for predicted in predictions:
        covered, used = _cover_along_axes(predicted, left)
        line = _plan_line(predicted, covered, gone)
        times = 1 if predicted.per_microbatch else _times_sent(covered, left)
        lines.append(replace(line, times=times))
        if predicted.per_microbatch:
            used |= _sent_in_other_trips(predicted, used, left)
        left = {i: d for i, d in left.items() if i not in used}
    lines = _read_factors(lines, factors)
    beyond = [d for i, d in left.items() if i not in gone]
    return replace(report, plan=(*lines, *_lines_beyond_plan(beyond)))


def _of_one_step(declared: Declared, steps: int) -> Declared:
    each, rest = divmod(declared.trips, steps)
    return declared if rest else replace(declared, trips=each)


def _cover_along_axes(
    predicted: Prediction, left: Mapping[int, Declared]
) -> tuple[dict[int, int], set[int]]:
    """Return the elements covered by each declaration on the worst axis, and all that cover any."""
    alike = {
        i: d for i, d in left.items() if (d.kind, d.dtype) == (predicted.kind, predicted.dtype)
    }
    # What is sent over all of its axes is it, and not another one over more, or over some of them.
    exact = {i for i, d in alike.items() if {*d.axes} == {*predicted.axes}}
    by_axis = [
        _cover_sizes(predicted.elements, {i: d for i, d in alike.items() if axis in d.axes}, exact)
        for axis in predicted.axes
    ]
    worst = min(by_axis, key=lambda covered: sum(covered.values()))
    return worst, {i for covered in by_axis for i in covered}


def _cover_sizes(
    sizes: Iterable[int], declared: Mapping[int, Declared], exact: Set[int]
) -> dict[int, int]:
    """Return how many elements of arrays of these sizes each declaration covers; exact first."""
    wanted = Counter(sizes)
    covered: dict[int, int] = {}
    sent = {i: d.elements * d.trips for i, d in declared.items()}
    # In a loop it may be a slice of the array, or else the whole of it each time.
    whole = {i: d.elements for i, d in declared.items()}
    for is_exact, size_of in ((True, sent), (True, whole), (False, sent), (False, whole)):
        for place, size in size_of.items():
            if (place in exact) == is_exact and place not in covered and wanted[size]:
                wanted[size] -= 1
                covered[place] = size
    buckets = {i: n for i, n in sent.items() if i not in covered}
    # wanted.elements() are the arrays that are left, each by its size.
    missing = sum(wanted.elements())
    if sum(buckets.values()) < missing:
        # Not all is there; then what is smaller than any array is certainly something else.
        buckets = {i: n for i, n in buckets.items() if n >= min(wanted.elements())}
    for place, elements in sorted(buckets.items(), key=lambda item: -item[1]):
        if missing:
            covered[place] = min(elements, missing)
            missing -= covered[place]
    return covered


def _sent_in_other_trips(
    predicted: Prediction, used: set[int], left: Mapping[int, Declared]
) -> set[int]:
    """Return what is sent under the same label, of the same kind, in pieces.

    One microbatch's pieces may cover all that is predicted of a line, in all trips.
    """
    labels = {_label_of(left[i]) for i in used} - {""}
    return {
        i
        for i, d in left.items()
        if (d.kind, d.dtype, d.axes) == (predicted.kind, predicted.dtype, predicted.axes)
        and d.trips > 1
        and _label_of(d) in labels
    }


def _label_of(declared: Declared) -> str:
    """Return the label of a tag: "grads" of "pmean/grads['w']"."""
    parts = re.split(r"[/\[]", declared.tag or "", maxsplit=2)
    return parts[1] if len(parts) > 1 else ""


def _times_sent(covered: Mapping[int, int], declared: Mapping[int, Declared]) -> int:
    """Return in how many trips of a loop all of an array is sent, and not a slice in each."""
    whole = [declared[i] for i, elements in covered.items() if declared[i].elements >= elements]
    return max((d.trips for d in whole), default=1)


def _plan_line(predicted: Prediction, covered: Mapping[int, int], gone: set[int]) -> PlanLine:
    size = jnp.dtype(predicted.dtype).itemsize
    eliminated = sum(n for place, n in covered.items() if place in gone)
    return PlanLine(
        what=predicted.what,
        kind=predicted.kind,
        axes=predicted.axes,
        dtype=predicted.dtype,
        payload_bytes=size * sum(predicted.elements),
        found_bytes=size * (sum(covered.values()) - eliminated),
        eliminated_bytes=size * eliminated,
        at_most=predicted.at_most,
        every=predicted.every,
    )


def _read_factors(lines: Sequence[PlanLine], factors: Sequence[GradientFactor]) -> list[PlanLine]:
    """Return the lines with the worst factor of the gradients; the first carries the note."""
    if not factors:
        return list(lines)
    read: list[PlanLine] = []
    factor, note = _worst_factor(factors)
    for line in lines:
        if line.what == GRADIENTS:
            line = replace(line, factor=factor, factor_note=note)
            note = ""  # of the gradients in all dtypes
        read.append(line)
    return read


def _worst_factor(factors: Sequence[GradientFactor]) -> tuple[str, str]:
    summed = [read for read in factors if read.factor == "sum"]
    unread = [read for read in factors if read.factor == "not read"]
    shared = [read for read in factors if read.shared_term]
    if summed:
        return "sum", (
            "the plan predicts the mean of the gradients, found the sum of those of local means, "
            f"{summed[0].times} times that, of {_name_some(summed)}: average them with tx.pmean"
        )
    notes = []
    if unread:
        notes.append(f"the factor of the gradients not read ({_name_some(unread)})")
    if shared:
        notes.append(
            "a term that is the same on every device summed once for each of them "
            f"({_name_some(shared)}: weight decay in the loss?)"
        )
    return "not read" if unread else "mean", ", ".join(notes)


def _name_some(factors: Sequence[GradientFactor]) -> str:
    first, *others = factors
    more = f" and {len(others)} more" if others else ""
    place = f" at {first.source}" if first.source else ""
    return f"{first.what}{more}{place}"


def _lines_beyond_plan(declared: Iterable[Declared]) -> list[PlanLine]:
    found: dict[tuple[str, str, tuple[str, ...], str], int] = defaultdict(int)
    for d in declared:
        found[d.tag or d.primitive, d.kind, d.axes, d.dtype] += d.payload_bytes * d.trips
    return [PlanLine(*key, payload_bytes=0, found_bytes=sent) for key, sent in found.items()]
