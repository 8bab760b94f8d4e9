"""Groups of parameters, each with an optimizer of its own."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.typing import ArrayLike

from txcore.optim import clipping
from txcore.optim.from_optax import as_optimizer
from txcore.optim.optimizer import Exchange, Optimizer, check_like_params
from txcore.path_rules import leaf_names, match_rules, shorten_names
from txcore.trees import Grads, OptState, Params, PyTree


def groups(by_rule: Mapping[str, Any], *, clip_norm: float | None = None) -> Optimizer:
    """Make an optimizer that updates each group of parameters by its own, chosen by path rules.

    A rule is a path with slashes between its keys and * for any characters: "embed", "*/b",
    "layers/0/*". The first rule that matches a parameter counts, so a last "*" takes the rest.

    Args:
      by_rule: rule -> `Optimizer` or optax transformation. The schedules of all groups follow the
        same step. An optimizer's own `clip_norm` clips by the norm of its group.
      clip_norm: the largest global norm of the gradients of all groups together, above 0; None
        does not clip.

    Returns:
      The optimizer. Its state is {rule: the state of the group's optimizer}, with None in the
      place of every parameter of another group.

    Raises:
      TypeError: a value is no optimizer, or a rule no text.
      ValueError: there is no rule; some optimizers take a gradient for each example and others
        do not; `clip_norm` is not above 0. From `init` on: a rule matches no parameter, or a
        parameter no rule.

    Example:
      >>> import jax.numpy as jnp
      >>> import txcore as tx
      >>> optimizer = tx.optim.groups({"*/b": tx.optim.sgd(0.5), "*": tx.optim.sgd(0.25)})
      >>> params = {"dense": {"b": jnp.ones(1), "w": jnp.ones(1)}}
      >>> state = optimizer.init(params)
      >>> params, state = optimizer.update(params, state, params, step=jnp.int32(0))
      >>> params["dense"]["b"].tolist(), params["dense"]["w"].tolist()
      ([0.5], [0.75])
    """
    _check_rules(by_rule)
    clipping.check_max_norm("groups", "clip_norm", clip_norm)
    optimizers = {rule: as_optimizer(given) for rule, given in by_rule.items()}
    per_example = _need_example_gradients(optimizers)

    def init(params: Params) -> OptState:
        chosen = _match_groups(optimizers, params)
        return {
            rule: optimizer.init(_select_group(params, chosen, rule))
            for rule, optimizer in optimizers.items()
        }

    def update(
        grads: Grads,
        opt_state: OptState,
        params: Params,
        *,
        step: jax.Array,
        grad_scale: ArrayLike = 1.0,
    ) -> tuple[Params, OptState]:
        if not per_example:
            check_like_params("groups", "gradients", grads, params)
        chosen = _match_groups(optimizers, params)
        scale = clipping.clipping_scale("groups", grads, clip_norm, grad_scale)
        # A user's own optimizer may have no grad_scale argument.
        options = {} if isinstance(scale, int | float) and scale == 1 else {"grad_scale": scale}
        new_state, taken = {}, {}
        for rule, optimizer in optimizers.items():
            own = [_select_group(tree, chosen, rule) for tree in (grads, params)]
            new, new_state[rule] = optimizer.update(
                own[0], opt_state[rule], own[1], step=step, **options
            )
            taken[rule] = iter(jax.tree.leaves(new))
        leaves = [next(taken[rule]) for rule in chosen]
        return jax.tree.unflatten(jax.tree.structure(params), leaves), new_state

    def exchanges(params: Params, specs: Any, sizes: Mapping[str, int]) -> list[Exchange]:
        found: list[Exchange] = []
        chosen = _match_groups(optimizers, params)
        for rule, optimizer in optimizers.items():
            if optimizer.exchanges is not None:
                own = [_select_group(tree, chosen, rule) for tree in (params, specs)]
                found += optimizer.exchanges(own[0], own[1], sizes)
        return found

    text = ", ".join(f"{rule!r}: {optimizer!r}" for rule, optimizer in optimizers.items())
    return Optimizer(
        init,
        update,
        per_example,
        handles_shards=all(optimizer.handles_shards for optimizer in optimizers.values()),
        exchanges=exchanges if any(one.exchanges for one in optimizers.values()) else None,
        clips=clip_norm is not None or any(optimizer.clips for optimizer in optimizers.values()),
        text=f"groups({{{text}}})",
    )


def _check_rules(by_rule: Any) -> None:
    if not isinstance(by_rule, Mapping):
        raise TypeError(
            f"groups needs a dict of optimizers by path, got {type(by_rule).__name__}: write "
            "tx.optim.groups({'*/b': tx.optim.sgd(0.1), '*': tx.optim.adamw(0.001)})"
        )
    if not by_rule:
        raise ValueError("groups needs at least one rule, got {}: '*' takes all")
    for rule in by_rule:
        if not isinstance(rule, str) or not rule:
            raise TypeError(
                f"groups needs paths as rules, such as 'dense/*', got {rule!r}: write the keys "
                "with slashes between them, and * for any characters"
            )


def _need_example_gradients(optimizers: Mapping[str, Optimizer]) -> bool:
    """Tell whether the groups need one gradient for each example; refuse a mixture."""
    kinds = {optimizer.per_example for optimizer in optimizers.values()}
    if len(kinds) > 1:
        rule = next(rule for rule, optimizer in optimizers.items() if optimizer.per_example)
        raise ValueError(
            "groups needs optimizers that all take one gradient for each parameter, or all one for "
            f"each example, got {rule!r} with one for each example and others without: give all "
            "groups such an optimizer"
        )
    return kinds.pop()


def _match_groups(optimizers: Mapping[str, Optimizer], params: Params) -> list[str]:
    """Return the rule of each parameter, in jax's order of leaves."""
    names = leaf_names(params)
    chosen = match_rules(tuple(optimizers), names, lambda rule: f"groups: the rule {rule!r}")
    without = [name for name, rule in zip(names, chosen, strict=True) if rule is None]
    if without:
        raise ValueError(
            f"groups needs a rule for every parameter, got {shorten_names(list(optimizers))}, of "
            f"which none matches {shorten_names(without)}: end with '*' for the rest"
        )
    return [rule for rule in chosen if rule is not None]


def _select_group(tree: PyTree, chosen: list[str], rule: str) -> PyTree:
    """Return a tree with None, which is no leaf to jax, in place of the other groups' leaves."""
    leaves, structure = jax.tree.flatten(tree)
    own = [leaf if c == rule else None for leaf, c in zip(leaves, chosen, strict=True)]
    return jax.tree.unflatten(structure, own)
