"""Which parameters an option or an optimizer is for: by path rules, a tree or a function."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from txcore.path_rules import leaf_names, match_rules

# "*/w", ["*/w", "embed"], a tree of bools like the parameters (or a prefix of it), or a function
# of the parameters that returns one.
Mask = str | Sequence[str] | Callable[[Any], Any] | Any


def mask_leaves(op: str, option: str, mask: Mask | None, params: Any) -> list[bool]:
    """Return for each leaf of the parameters whether a mask is for it.

    Args:
      op: the optimizer's name, for the errors.
      option: the mask's name, for the errors.
      mask: path rules, a tree of bools or a function; None is for every leaf.
      params: pytree of the parameters.

    Returns:
      A bool for each leaf, in jax's order.

    Raises:
      TypeError: a leaf of the tree is no bool.
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
            f"{op}: {option} must be path rules, or a tree of bools like the parameters; got one "
            f"of another structure ({error}). Write '*/w', or jax.tree.map(lambda p: p.ndim > 1, "
            "params)."
        ) from None
    leaves = jax.tree.leaves(whole)
    for leaf in leaves:
        if not isinstance(leaf, bool | np.bool_):
            raise TypeError(
                f"{op}: {option} must have Python bools as its leaves, known before the step is "
                f"compiled; got {type(leaf).__name__}: {leaf!r}. True takes a parameter, False "
                "leaves it out."
            )
    return [bool(leaf) for leaf in leaves]


def check_decay(op: str, mask: Mask | None, weight_decay: float) -> None:
    """Refuse a mask of a decay that there is none of."""
    if mask is not None and weight_decay == 0:
        raise ValueError(
            f"{op}: decay_mask must come with a weight_decay above 0; got {weight_decay}. Pass "
            "weight_decay=0.01, or leave decay_mask out."
        )


def _as_rules(mask: Any) -> tuple[str, ...]:
    """Return the path rules that a mask is made of; none where it is something else."""
    rules = (mask,) if isinstance(mask, str) else mask
    is_rules = isinstance(rules, list | tuple) and all(isinstance(rule, str) for rule in rules)
    return tuple(rules) if is_rules else ()
