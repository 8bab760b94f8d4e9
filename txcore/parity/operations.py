"""Find the first recorded operation at which two runs part.

Values are compared example by example. An example of a layer is looked for among all that the
other run recorded by that name, since plans differ in which device computes it, in which microbatch
and on which stage. Dims that devices share are put together by their spec first.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from txcore.layout import entry_axes
from txcore.parallel.context import merge_chunks
from txcore.parity.agreement import explain_ratio
from txcore.parity.recording import Call, Recording

# The cosine of the angle between values of which one is a multiple of the other.
_PARALLEL = 1 - 1e-5
# As for a leaf: another rounding rarely changes a norm four times as much.
_OF_ROUNDING = 4.0


@dataclass(frozen=True)
class Side:
    """Hold what one of two runs recorded, and how its examples lie on its mesh.

    Attributes:
      recording: of the run.
      row_axes: axes along which devices have different examples, or different layers; None if
        unknown: then any device may have any example.
      balanced: the axis whose devices hold the sequence as `tx.context.split_chunks` deals it out.
      computes_idly: whether devices compute where it is not their turn, and drop it: stages of a
        pipeline with permutes in them.
    """

    recording: Recording
    row_axes: tuple[str, ...] | None = None
    balanced: str | None = None
    computes_idly: bool = False


class _Rows(NamedTuple):
    """Hold what a run recorded by one name, on devices that have different examples.

    Attributes:
      where: what these devices have in common: their index along other axes.
      numbers: of each example the number of the call.
      values: float64 (examples, ...), the parts of devices put together.
      parts: into how many each dim is split.
    """

    where: dict[str, int]
    numbers: np.ndarray
    values: np.ndarray
    parts: tuple[int, ...]


def find_first_difference(
    first: Side,
    second: Side,
    *,
    factors: Mapping[int, str],
    rtol: float,
    noise: Sequence[Side] = (),
) -> str:
    """Say at which recorded operation the second run parts from the first, or that none does.

    Args:
      first: the reference.
      second: the other.
      factors: numbers that may be the ratio of the two, as for `Agreement`.
      rtol: tolerance, relative to the norm of an example's value.
      noise: further runs of the reference, rounded otherwise: as much is no difference.
    """
    counts = _count_calls(first.recording)
    if not counts:
        return "tx.testing.record(x, name) in the model shows at which operation they part first"
    texts: dict[tuple[str, int], str] = {}
    for name in counts:
        found = _compare_values(name, first, second, factors, rtol, noise)
        if found is not None:
            texts[name, found[0]] = found[1]
    for name, number in _order_calls(counts):
        if (name, number) in texts:
            of_all = f", call {number + 1} of {counts[name]}" if counts[name] > 1 else ""
            text = texts[name, number]
            return f"the first recorded operation that differs is {name!r}{of_all}: {text}"
    if not second.computes_idly:
        for name in counts:
            if (number := _count_unknown(name, first, second, rtol, noise)) > 0:
                return (
                    f"the first recorded operation that differs is {name!r}: it has all of the "
                    f"reference's examples, and {number} that the reference does not have"
                )
    names = ", ".join(map(repr, counts))
    return (
        f"all recorded operations agree ({names}): what differs is made of them later, in the "
        "backward pass, or by the reduction of gradients"
    )


def _count_calls(recording: Recording) -> dict[str, int]:
    """Return how often a device recorded each name, in the order of the traced program."""
    found: dict[str, dict[tuple[int, ...], int]] = defaultdict(lambda: defaultdict(int))
    for call in recording.calls:
        found[call.name][tuple(call.place.values())] += 1
    return {name: max(found[name].values()) for name in recording.names if name in found}


def _order_calls(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Return all calls in order: names of one loop, which come equally often, take turns."""
    order = []
    for count, names in itertools.groupby(counts, counts.__getitem__):
        loop = list(names)
        order += [(name, number) for number in range(count) for name in loop]
    return order


def _compare_values(
    name: str,
    first: Side,
    second: Side,
    factors: Mapping[int, str],
    rtol: float,
    noise: Sequence[Side],
) -> tuple[int, str] | None:
    """Return the number of the first call that differs, and how; None if none does."""
    wanted = _assemble_rows(first, name)[0]
    found = _assemble_rows(second, name)
    if not found:
        return int(wanted.numbers.min()), "the second run does not record it"
    for rows in found:
        if rows.values.shape[1:] != wanted.values.shape[1:]:
            return int(wanted.numbers.min()), (
                f"an example has shape {wanted.values.shape[1:]} in the first run and "
                f"{rows.values.shape[1:]} in the second: if devices hold parts of it, give their "
                f"axes, record(x, {name!r}, spec=PartitionSpec(None, ..., axis))"
            )
    allowed = _find_allowance(wanted, rtol, [_assemble_rows(side, name)[0] for side in noise])
    for rows in found:
        differs = _measure_distances(wanted.values, rows.values).min(1) > allowed
        differs |= ~np.isfinite(_flatten_rows(wanted.values)).all(1)
        if differs.any():
            number = int(wanted.numbers[differs].min())
            mine = differs & (wanted.numbers == number)
            text = _describe_difference(wanted, rows, mine, name, second, factors, allowed)
            where = f" on the devices at {rows.where}" if rows.where and len(found) > 1 else ""
            of_all = int((wanted.numbers == number).sum())
            return number, f"{int(mine.sum())} of {of_all} examples{where}, {text}"
    return None


def _count_unknown(name: str, first: Side, second: Side, rtol: float, noise: Sequence[Side]) -> int:
    """Count the examples of the second run that the reference does not have."""
    wanted = _assemble_rows(first, name)[0]
    allowed = _find_allowance(wanted, rtol, [_assemble_rows(side, name)[0] for side in noise]).max(
        initial=0.0
    )
    found = _assemble_rows(second, name)
    return sum(
        int((_measure_distances(r.values, wanted.values).min(1) > allowed).sum()) for r in found
    )


def _find_allowance(wanted: _Rows, rtol: float, noise: Sequence[_Rows]) -> np.ndarray:
    """Return what the value of each example may differ by."""
    norms = np.linalg.norm(_flatten_rows(wanted.values), axis=1)
    allowed = rtol * np.maximum(norms, 1e-3 * np.max(norms, initial=0.0)) + 1e-30
    for other in noise:
        if other.values.shape == wanted.values.shape:
            changes = np.linalg.norm(
                _flatten_rows(other.values) - _flatten_rows(wanted.values), axis=1
            )
            allowed = np.maximum(allowed, _OF_ROUNDING * changes)
    return allowed


def _flatten_rows(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1)


def _measure_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the norms of all differences between rows; inf where one is not finite."""
    left, right = _flatten_rows(left), _flatten_rows(right)
    with np.errstate(invalid="ignore", over="ignore"):
        squares = (left**2).sum(1)[:, None] + (right**2).sum(1) - 2 * left @ right.T
        near = np.sqrt(np.maximum(np.where(np.isfinite(squares), squares, np.inf), 0))
        # What the difference of squares loses is taken anew from those that are nearest.
        best = near.argmin(1)
        exact = np.linalg.norm(left - right[best], axis=1)
    near[np.arange(len(left)), best] = np.where(np.isfinite(exact), exact, np.inf)
    return near


def _describe_difference(
    wanted: _Rows,
    rows: _Rows,
    differs: np.ndarray,
    name: str,
    second: Side,
    factors: Mapping[int, str],
    allowed: np.ndarray,
) -> str:
    left, right = wanted.values[differs], rows.values
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return "not finite"
    flat, other = _flatten_rows(left), _flatten_rows(right)
    nearest = _measure_distances(left, right).argmin(1)
    norms = np.linalg.norm(flat, axis=1)[:, None] * np.linalg.norm(other, axis=1)
    cosines = flat @ other.T / np.maximum(norms, 1e-300)
    alike = np.abs(cosines).argmax(1)
    along = np.abs(cosines).max(1)
    if flat.shape[1] > 1 and (along > _PARALLEL).all():
        ratio = float(np.median((flat * other[alike]).sum(1) / (flat**2).sum(1)))
        return f"{ratio:.4g} times the reference's{explain_ratio(ratio, factors)}"
    if (text := _find_other_order(left, rows, name, second, allowed[differs])) is not None:
        return text
    change = other[nearest] - flat
    if len(change) > 1 and _is_constant(change):
        return (
            f"by one vector in every example (its largest element is {np.abs(change).max():.3g}): "
            "added once more, or once too little"
        )
    worst, largest = np.abs(change).max(), np.abs(flat).max()
    return f"by up to {worst:.3g}, beside values up to {largest:.3g}"


def _is_constant(change: np.ndarray) -> bool:
    mean = change.mean(0)
    return bool(np.linalg.norm(change - mean) < 1e-3 * np.linalg.norm(change))


def _find_other_order(
    left: np.ndarray, rows: _Rows, name: str, second: Side, allowed: np.ndarray
) -> str | None:
    """Say that the right parts are there in another order, if they are."""
    if second.balanced is not None:
        plain = _assemble_rows(replace(second, balanced=None), name)
        same = [r for r in plain if r.where == rows.where]
        if same and (_measure_distances(left, same[0].values).min(1) <= allowed).all():
            return (
                f"tokens in another order: along {second.balanced!r} the first device holds the "
                "first part of the sequence, not its first and last chunk. Give the batch as "
                "tx.context.split_chunks deals it out, and take the tokens' places from "
                "tx.context.positions"
            )
    for dim, parts in enumerate(rows.parts, 1):
        if not 1 < parts <= 8:
            continue
        pieces = np.split(left, parts, dim), np.split(rows.values, parts, dim)
        holders = [
            [i for i, theirs in enumerate(pieces[1]) if _are_in(mine, theirs, allowed)]
            for mine in pieces[0]
        ]
        if all(holders):
            held = ", ".join(f"{i} by device {found[0]}" for i, found in enumerate(holders))
            return f"its parts along dim {dim} are held by other devices: part {held}"
    return None


def _are_in(left: np.ndarray, right: np.ndarray, allowed: np.ndarray) -> bool:
    return bool((_measure_distances(left, right).min(1) <= allowed).all())


def _assemble_rows(side: Side, name: str) -> list[_Rows]:
    """Return what was recorded by a name, for each group of devices that have all examples."""
    calls = [call for call in side.recording.calls if call.name == name]
    groups: dict[tuple[tuple[str, int], ...], dict[tuple[int, ...], list[Call]]] = {}
    for number, call in _number_calls(calls):
        split = {axis for entry in call.spec[1:] for axis in entry_axes(entry)}
        row_axes = tuple(call.place) if side.row_axes is None else side.row_axes
        others = {a: i for a, i in call.place.items() if a not in split and call.sizes[a] > 1}
        common = tuple((a, i) for a, i in others.items() if a not in row_axes)
        place = (number, *(i for a, i in others.items() if a in row_axes))
        groups.setdefault(common, {}).setdefault(place, []).append(call)
    found = []
    for common, by_place in sorted(groups.items()):
        wholes = [
            (place[0], _join_parts(calls, side.balanced)) for place, calls in by_place.items()
        ]
        numbers = np.concatenate([np.full(len(whole), number) for number, whole in wholes])
        values = np.concatenate([whole for _, whole in wholes])
        call = next(iter(by_place.values()))[0]
        found.append(_Rows(dict(common), numbers, values, _count_parts(call)))
    return found


def _number_calls(calls: Sequence[Call]) -> list[tuple[int, Call]]:
    """Return each call with its number among those of its device, in the program's order."""
    seen: dict[tuple[int, ...], int] = defaultdict(int)
    numbered = []
    for call in sorted(calls, key=lambda call: call.site):
        device = tuple(call.place.values())
        numbered.append((seen[device], call))
        seen[device] += 1
    return numbered


def _count_parts(call: Call) -> tuple[int, ...]:
    """Return into how many parts each dim is split, but that of the examples."""
    entries = [*call.spec, *[None] * (call.value.ndim - len(call.spec))]
    return tuple(math.prod(call.sizes.get(a, 1) for a in entry_axes(e)) for e in entries[1:])


def _join_parts(calls: Sequence[Call], balanced: str | None) -> np.ndarray:
    """Put the parts of devices that share one value together."""
    one = calls[0]
    parts = (1, *_count_parts(one))
    shape = [size * count for size, count in zip(one.value.shape, parts, strict=True)]
    whole = np.full(shape, np.nan)
    for call in calls:
        at = []
        for dim, size in enumerate(call.value.shape):
            index = _part_of(call, dim) if dim else 0
            at.append(slice(index * size, (index + 1) * size))
        whole[tuple(at)] = call.value
    for dim, entry in enumerate(one.spec):
        if dim and entry_axes(entry) == (balanced,) and parts[dim] > 1:
            whole = merge_chunks(whole, parts[dim], dim=dim)
    return whole


def _part_of(call: Call, dim: int) -> int:
    entry = call.spec[dim] if dim < len(call.spec) else None
    index = 0
    for axis in entry_axes(entry):
        index = index * call.sizes.get(axis, 1) + call.place.get(axis, 0)
    return index
