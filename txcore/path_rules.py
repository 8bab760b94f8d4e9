"""Path rules: which leaves a pattern such as "mlp/*" means; the first that matches counts."""

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import jax

_SHOWN = 8  # paths in an error


def path_name(path: Any) -> str:
    """Return a leaf's path as rules name it: "mlp/w1", "layers/0/w"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_names(tree: Any) -> list[str]:
    """Return the paths of a tree's leaves as rules name them, in jax's order.

    Example:
      >>> leaf_names({"mlp": {"w1": 1, "w2": 2}, "layers": [3]})
      ['layers/0', 'mlp/w1', 'mlp/w2']
    """
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def match_rules(
    rules: Sequence[str], names: Sequence[str], describe_rule: Callable[[str], str]
) -> list[str | None]:
    """Return for each path the first rule that it matches, None where it matches none.

    Args:
      rules: patterns, in which * stands for any characters.
      names: paths, as of `leaf_names`.
      describe_rule: what an error calls a rule.

    Raises:
      ValueError: a rule matches nothing, or only what rules before it took.

    Example:
      >>> match_rules(["*/b", "mlp/*"], ["mlp/b", "mlp/w", "out"], repr)
      ['*/b', 'mlp/*', None]
    """
    first = [next((rule for rule in rules if _matches(rule, name)), None) for name in names]
    for rule in rules:
        if rule not in first:
            raise ValueError(_explain_unused(rule, names, first, describe_rule(rule)))
    return first


def shorten_names(names: Sequence[str]) -> str:
    """Return some paths for an error, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def _matches(rule: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, rule)


def _explain_unused(rule: str, names: Sequence[str], first: Sequence[str | None], what: str) -> str:
    taken = [i for i, name in enumerate(names) if _matches(rule, name)]
    if taken:
        name, before = names[taken[0]], first[taken[0]]
        return (
            f"{what} needs a parameter of its own, but the first rule that matches counts, and "
            f"{name!r} goes to {before!r} before it: put the narrower rule first, or remove one"
        )
    return (
        f"{what} needs a parameter that it matches, but they are {shorten_names(names)}: write "
        "the whole path, with * for any characters, or remove the rule"
    )
