"""Masks that say which parameters an option is for: path rules, a tree of bools or a function."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from txcore.path_rules import leaf_names, match_rules
from txcore.trees import Params, PyTree

# "*/w", ["*/w", "embed"], a tree of bools like the parameters (or a prefix of it), or a function
# of the parameters that returns one.
Mask = str | Sequence[str] | Callable[[Params], PyTree] | PyTree


def mask_leaves(op: str, option: str, mask: Mask | None, params: Params) -> list[bool]:
    """Return for each leaf of the parameters whether the mask includes it.

    Args:
      op: the optimizer's name, for the errors.
      option: the mask's name, for the errors.
      mask: path rules, a tree of bools or a function; None includes every leaf.
      params: pytree of the parameters.

    Returns:
      A bool for each leaf, in jax's order.

    Raises:
      TypeError: a leaf of the mask is not a bool.
      ValueError: a rule matches no parameter, or the tree is not one of the parameters.
    """
    names = leaf_names(params)
    if mask is None:
        return [True] * len(names)
    if wanted := _as_rules(mask):
        return [
            rule is not None
            for rule in match_rules(wanted, names, lambda rule: f"{op}: the rule {rule!r}")
        ]
    tree = mask(params) if callable(mask) else mask
    try:
        whole = jax.tree.map(lambda one, part: jax.tree.map(lambda _: one, part), tree, params)
    except ValueError as error:
        raise ValueError(
            f"{op}: {option} needs path rules, or a tree of bools like the parameters, got one of "
            f"another structure ({error}): write '*/w', or jax.tree.map(lambda p: p.ndim > 1, "
            "params)"
        ) from None
    leaves = jax.tree.leaves(whole)
    for leaf in leaves:
        if not isinstance(leaf, bool | np.bool_):
            raise TypeError(
                f"{op}: {option} needs Python bools as its leaves, known before the step is "
                f"compiled, got {leaf!r} ({type(leaf).__name__}): write True to take a parameter, "
                "False to leave it out"
            )
    return [bool(leaf) for leaf in leaves]


def check_decay(op: str, mask: Mask | None, weight_decay: float) -> None:
    """Refuse a decay mask without a decay."""
    if mask is not None and weight_decay == 0:
        raise ValueError(
            f"{op}: decay_mask needs a weight_decay above 0, got {weight_decay}: pass "
            "weight_decay=0.01, or leave decay_mask out"
        )


def _as_rules(mask: Any) -> tuple[str, ...]:
    """Return a mask's path rules, or none where it is a tree or a function."""
    rules = (mask,) if isinstance(mask, str) else mask
    is_rules = isinstance(rules, list | tuple) and all(isinstance(rule, str) for rule in rules)
    return tuple(rules) if is_rules else ()
