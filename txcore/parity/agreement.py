"""Compare two trees of numbers up to rounding, and explain their differences."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

_LOG = logging.getLogger("txcore")

# Returns why a leaf, given by its number, exceeds the tolerance by so much; None if nothing does.
Excuse = Callable[[int, np.ndarray], str | None]

# What rounding changes is random: another rounding rarely changes a norm four times as much.
_OF_ROUNDING = 4.0
# A wrong factor changes a leaf by half of its norm or more; this much is still no such thing.
_OF_LEAF = 0.25


@dataclass(frozen=True)
class Agreement:
    """Compare trees of float64 arrays leaf by leaf.

    Attributes:
      when: what errors begin with.
      factors: numbers that may explain a ratio, and of what they are: "devices along 'data'".
      rtol: tolerance relative to each element.
      atol: tolerance relative to the leaf's largest element.
      between: what is compared.
    """

    when: str
    factors: Mapping[int, str]
    rtol: float
    atol: float
    between: str = "plans"

    def check(
        self,
        what: str,
        first: Any,
        second: Any,
        *,
        floor: Sequence[np.ndarray | float] | None = None,
        excuse: Excuse | None = None,
    ) -> None:
        """Refuse trees that differ.

        Args:
          what: the trees' name.
          first: the reference.
          second: the other.
          floor: for each leaf what a difference may always be, absolute.
          excuse: asked where a leaf differs by more.

        Raises:
          AssertionError: naming the leaf, how many of its elements differ, the ratio between the
            two, and what usually causes it.
        """
        if jax.tree.structure(first) != jax.tree.structure(second):  # type: ignore[operator]
            raise AssertionError(
                f"{self.when}: {what} have another structure in the second of the {self.between}: "
                f"{jax.tree.structure(first)} and {jax.tree.structure(second)}"
            )
        paths = jax.tree_util.tree_flatten_with_path(first)[0]
        for i, ((path, left), right) in enumerate(zip(paths, jax.tree.leaves(second), strict=True)):
            where = f"{self.when}: {what}{jax.tree_util.keystr(path)}"
            if left.shape != right.shape:
                raise AssertionError(f"{where} has shape {left.shape} and {right.shape}")
            if not (np.isfinite(left).all() and np.isfinite(right).all()):
                raise AssertionError(f"{where} is not finite: such values cannot be compared")
            allowed = self.rtol * np.abs(left) + self.atol * np.max(np.abs(left), initial=0.0)
            allowed = allowed + (1e-30 if floor is None else floor[i])
            beyond = np.maximum(np.abs(right - left) - allowed, 0)
            count = np.count_nonzero(beyond)
            if not count:
                continue
            of_all = f"{count} of {left.size} elements"
            reason = excuse(i, beyond) if excuse is not None else None
            if reason is None:
                text = _explain_difference(left, right, beyond, self)
                raise AssertionError(
                    f"{where} differs between the {self.between}: {of_all}, {text}"
                )
            _LOG.info("txcore: %s: %s differ: %s", where, of_all, reason)


def of_rounding(
    reference: Any, probes: Callable[[], Sequence[Any]], last_place: float = 0.0
) -> Excuse:
    """Return an excuse: rounding the parameters otherwise changes the leaf by as much.

    Args:
      reference: the tree.
      probes: returns the same tree of runs whose parameters were rounded otherwise.
      last_place: what a leaf that is nothing but rounding may differ by in any case.
    """

    def excuse(i: int, beyond: np.ndarray) -> str | None:
        leaf = jax.tree.leaves(reference)[i]
        norm = float(np.linalg.norm(leaf))
        changes = [np.linalg.norm(jax.tree.leaves(probe)[i] - leaf) for probe in probes()]
        noise = max(map(float, changes), default=0.0)
        allowed = _OF_ROUNDING * noise
        is_noise = noise >= norm / 2  # as a gradient that is really 0
        allowed = max(allowed, last_place) if is_noise else min(allowed, _OF_LEAF * norm)
        if np.linalg.norm(beyond) > allowed:
            return None
        return (
            "rounding changes them as much, as it does at a tie (of a max-pool, a sort, an argmax) "
            "and in a difference of what is nearly equal"
        )

    return excuse


def of_inputs(explained: Callable[[], Any]) -> Excuse:
    """Return an excuse: `explained()` is, for each element, what other inputs change it by."""

    def excuse(i: int, beyond: np.ndarray) -> str | None:
        allowed = 2 * np.abs(jax.tree.leaves(explained())[i])
        return "the optimizer makes that of the gradients" if (beyond <= allowed).all() else None

    return excuse


def norm_of(tree: Any) -> float:
    """Return the norm of all leaves together."""
    return float(np.sqrt(sum(float(np.sum(leaf**2)) for leaf in jax.tree.leaves(tree))))


def _explain_difference(
    left: np.ndarray, right: np.ndarray, beyond: np.ndarray, agreement: Agreement
) -> str:
    """Explain a difference by its ratio if it has one: N and 1/N are the usual mistakes."""
    worst = float(np.max(np.abs(left - right)))
    differs = beyond > 0
    few = 10 * np.count_nonzero(differs) < differs.size
    box = _describe_box(differs)
    large = np.abs(left) > 1e-3 * np.max(np.abs(left), initial=0.0)
    if box or not few:  # elsewhere it has another ratio: in other layers, in other devices' parts
        large &= differs
    ratios = right[large] / left[large] if large.any() else np.array([np.nan])
    ratio = float(np.median(ratios))
    text = f"largest difference {worst:.3g}{box}, median ratio second/first {ratio:.4g}"
    if np.isnan(ratio) or np.max(np.abs(ratios - ratio)) > 1e-2 * abs(ratio):
        tie = "; so few may be a tie (of a max-pool, a sort, an argmax) that the plans break"
        told = few and not box
        return text + (
            f"{tie} differently, but rounding otherwise does not show it" if told else ""
        )
    return text + explain_ratio(ratio, agreement.factors)


def explain_ratio(ratio: float, factors: Mapping[int, str]) -> str:
    """Say which mistake makes a value `ratio` times what it should be, if one is known."""
    for n, what in sorted(factors.items()):
        if abs(ratio - n) < 1e-2 * n:
            return f" = N for N = {n} {what}: summed where the mean is meant, or once more over it"
        if abs(ratio - 1 / n) < 1e-2 / n:
            return f" = 1/N for N = {n} {what}: averaged twice, or not summed over it"
    if abs(ratio + 1) < 1e-2:
        return ": the sign is another one"
    if abs(ratio) < 1e-6:
        return ": it is missing"
    return ""


def name_factors(meshes: Sequence[Mapping[str, int]], counts: Mapping[str, int]) -> dict[int, str]:
    """Return what numbers may be factors by mistake, and of what each is.

    Args:
      meshes: the size of each axis by name.
      counts: other numbers by what they count: {"microbatches": 4}.
    """
    found: dict[int, list[str]] = {}

    def add(number: int, what: str) -> None:
        names = found.setdefault(number, [])
        if number > 1 and what not in names:
            names.append(what)

    for mesh in meshes:
        for axis, size in mesh.items():
            add(size, f"devices along {axis!r}")
    for what, number in counts.items():
        add(number, what)
    for mesh in meshes:
        if math.prod(mesh.values()) not in found:
            add(math.prod(mesh.values()), "devices")
    joined = {number: " or ".join(names) for number, names in found.items() if number > 1}
    return {number: text.replace(" or devices along", " or") for number, text in joined.items()}


def _describe_box(differs: np.ndarray) -> str:
    """Say which layers, or which part of a dim, hold all that differs; "" if that is no slab."""
    for dim, whole in enumerate(differs.shape):
        others = tuple(d for d in range(differs.ndim) if d != dim)
        at = np.flatnonzero(differs.any(axis=others))
        start, stop = int(at[0]), int(at[-1]) + 1
        slab = np.take(differs, range(start, stop), dim)
        if stop - start < whole and 2 * np.count_nonzero(slab) > slab.size > 1:
            return f", all in [{start}:{stop}] of dim {dim}"
    return ""
