"""Say of each collective that nobody asked for why it is there, and what says the same explicitly.

Arrays of one line that were needed by the same kind of operation are one reason, whatever ops the
compiler made of them.
"""

import linecache
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from txcore.outside import printable
from txcore.profiling.declared import source
from txcore.profiling.report.numbers import format_bytes
from txcore.profiling.report.rows import Collective, Part

_MOST_SHOWN = 20
_MOST_TYPES = 3
_WIDTH = 100
_SUMS = ("all-reduce", "reduce-scatter")
_Sent = tuple[Collective, Part, str]  # a row, one of its arrays, and the path of what needed it
_WORDS = re.compile(r"^(?:jit|pjit|jvp|vmap|transpose|checkpoint|rematted_computation|shard_map)\b")


@dataclass(frozen=True)
class Why:
    """Why collectives of one line are there.

    Attributes:
      place: "model/block.py:12", from the working folder; "" where no line is known.
      text: that line; "" where the file is not there.
      operations: the jax primitives that needed them ("dot_general"); none at an edge.
      module: the paths of the flax, equinox or named scopes ("Block/mlp"), or the argument that
        is moved ("the argument x"); "" without one.
      backward: whether autodiff made the operations.
      kind, axes: of the collectives.
      types: how an array lies before and after, as jax writes types: "float32[16@data,8]" is split
        over data, "float32[64]{U:data}" holds parts of a sum. Each once, largest arrays first.
      arrays: how many arrays they send.
      payload_bytes: of one call.
      reason: what needed them, in a sentence.
      instead: the explicit line that says the same.
    """

    place: str
    text: str
    operations: tuple[str, ...]
    module: str
    backward: bool
    kind: str
    axes: tuple[str, ...]
    types: tuple[tuple[str, str], ...]
    arrays: int
    payload_bytes: int
    reason: str
    instead: str


def explain_rows(rows: Iterable[Collective]) -> tuple[Why, ...]:
    """Return the reasons of the rows that nobody asked for, those that send the most first."""
    groups: dict[object, list[_Sent]] = {}
    for row in rows:
        if not row.explained:
            for part, path in _parts_of(row):
                advice = _advise(row.kind, _name_of(path), row.axes, backward=_is_back(path))
                key = part.place or part.source, row.kind, row.axes, advice
                groups.setdefault(key, []).append((row, part, path))
    found = map(_explain, groups.values())
    return tuple(sorted(found, key=lambda why: (-why.payload_bytes, why.place)))


def write_reasons(reasons: Sequence[Why]) -> list[str]:
    """Write reasons for the terminal: each once, with the lines that it holds for."""
    alike: dict[object, list[Why]] = {}
    for why in reasons:
        key = why.kind, why.axes, why.backward, why.reason, why.instead
        alike.setdefault(key, []).append(why)
    return [line for of in alike.values() for line in _write_alike(of)]


def _write_alike(of: Sequence[Why]) -> Iterator[str]:
    first = of[0]
    half = " in the backward pass" if first.backward else ""
    over = "+".join(first.axes) or "?"
    yield printable(f"why {first.kind} over {over}{half}: {first.reason}")
    yield printable(f"  write {first.instead}")
    for why in of[:_MOST_SHOWN]:
        more = f" +{why.arrays - 1}" if why.arrays > 1 else ""
        names = ": ".join(filter(None, [why.module, ", ".join(why.operations)]))
        sent = format_bytes(why.payload_bytes)
        yield printable(f"  {why.place or '?'}{more}  {names or 'an edge'}  {sent} a call")
        if why.text:
            yield printable(f"    | {why.text}")[:_WIDTH]
        for held, wanted in why.types[:_MOST_TYPES]:
            yield printable(f"    {held} -> {wanted}")
        if len(why.types) > _MOST_TYPES:
            yield f"    and {len(why.types) - _MOST_TYPES} more"
    if len(of) > _MOST_SHOWN:
        yield f"  and {len(of) - _MOST_SHOWN} lines more"


def _parts_of(row: Collective) -> Iterator[tuple[Part, str]]:
    """Yield the arrays of a row, each with the path of what needed it."""
    paths = _split_path(row.op_name)
    for i, part in enumerate(row.parts):
        own = _split_path(part.op_name or row.op_name)
        is_listed = len(own) > 1 and len(own) == len(row.parts)
        yield part, own[i] if is_listed else own[0] if own else (paths or [""])[0]


def _split_path(op_name: str) -> list[str]:
    """Return the paths of what XLA merged: "jit(f)/(a/dot_general:b/reduce_sum)" has two."""
    head, bracket, merged = op_name.partition("/(")
    if not (bracket and merged.endswith(")")):
        return [op_name]
    return [f"{head}/{path}" for path in merged[:-1].split(":")]


def _name_of(path: str) -> str:
    """Return the primitive at the end of a path; "" where it is an edge."""
    last = path.rpartition("/")[2] if "/" in path else ""
    return "" if last in ("shard_map", "sharding_constraint", "reshard") else last


def _is_back(path: str) -> bool:
    return "transpose(" in path


def _explain(group: Sequence[_Sent]) -> Why:
    row, part, path = group[0]
    file, _, line = part.place.rpartition(":")
    text = linecache.getline(file, int(line)).strip() if file and line.isdecimal() else ""
    backward = _is_back(path)
    reason, instead = _advise(row.kind, _name_of(path), row.axes, backward=backward)
    names = dict.fromkeys(_name_of(path) for _, _, path in group)
    largest = sorted(group, key=lambda sent: -sent[1].payload_bytes)
    return Why(
        place=source.near_line(part.place) or part.source,
        text=text,
        operations=tuple(filter(None, names)),
        module=", ".join(dict.fromkeys(filter(None, (_module_of(path) for _, _, path in group)))),
        backward=backward,
        kind=row.kind,
        axes=row.axes,
        types=tuple(dict.fromkeys(part.types for _, part, _ in largest if part.types[0])),
        arrays=len(group),
        payload_bytes=sum(part.payload_bytes * row.trips for row, part, _ in group),
        reason=reason,
        instead=instead,
    )


def _module_of(path: str) -> str:
    """Return the scopes of a path, without jax's own: "jit(f)/jvp(Block)/o/dot" has "Block/o"."""
    if path and "/" not in path:
        return f"the argument {path}"
    names = []
    for part in path.split("/")[1:-1]:
        inner = part
        while (found := _WORDS.match(inner)) and inner.endswith(")"):
            inner = inner[found.end() + 1 : -1]
        if inner and not _WORDS.match(inner) and inner not in ("while", "body", "closed_call"):
            names.append(inner)
    return "/".join(names)


_EXTREMES = {"reduce_max": "pmax", "reduce_min": "pmin"}


def _advise(kind: str, operation: str, axes: tuple[str, ...], *, backward: bool) -> tuple[str, str]:
    """Return why a collective is needed, and the explicit line that says the same."""
    over = "+".join(axes) or "the devices"
    axis = repr(axes[0]) if len(axes) == 1 else repr(axes) if axes else "AXIS"
    if kind in _SUMS and backward and operation:
        return (
            f"the gradient of what is equal along {over} is the sum of the devices' parts",
            f"tx.pmean(grads, {axis}) of the gradients of parameters; of an activation, "
            f"tx.vary(x, {axis}) where it goes in, whose transpose is this sum",
        )
    if kind in _SUMS and operation in _EXTREMES:
        return (
            f"the dim that is reduced is split over {over}",
            f"tx.{_EXTREMES[operation]}(y, {axis}), y being the result on the device's part",
        )
    if kind in _SUMS and operation:
        call = "tx.psum_scatter" if kind == "reduce-scatter" else "tx.psum"
        return (
            f"the dim that is summed is split over {over}: each device has a part of the sum",
            f"{call}(y, {axis}), y being the result on the device's part",
        )
    if not operation:
        return (
            f"at an edge (in_specs, in_shardings, out_shardings, a constraint) an array lies "
            f"otherwise along {over}",
            "the sharding of one at the other, so that both are the same",
        )
    if kind == "all-gather":
        return (
            f"the whole of a dim is needed that is split over {over}",
            f"tx.all_gather(x, {axis}, ...) before it, or give x a sharding that suits it",
        )
    if kind == "all-to-all":
        return (
            f"another dim has to be split over {over} than is",
            f"tx.all_to_all(x, {axis}, ...) before it, or give x a sharding that suits it",
        )
    if kind == "collective-permute":
        return (
            f"elements are needed that neighbours along {over} have",
            f"tx.shift(x, {axis}, ...) or tx.ppermute of the elements that it needs",
        )
    return (f"other devices along {over} have what is needed", "it in jax.shard_map")
