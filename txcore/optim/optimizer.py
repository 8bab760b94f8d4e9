"""What an optimizer is, and how one goes over the leaves of a tree."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from txcore import _compat, varying
from txcore.collectives._leaves import names_of
from txcore.kernels.common import checks
from txcore.layout import split_axes
from txcore.step_scope import current_scope, split_axes_like
from txcore.trees import Grads, OptState, Params, PyTree

LeafUpdates = Sequence[Callable[..., tuple[jax.Array, ...]]]


class Exchange(NamedTuple):
    """State what an optimizer sends by one collective.

    Attributes:
      kind: HLO's name ("all-gather").
      axes: the mesh axes.
      dtype: jax's name of the dtype.
      elements: as they enter into S of nccl-tests.
    """

    kind: str
    axes: tuple[str, ...]
    dtype: str
    elements: int


Exchanges = Callable[[PyTree, PyTree, Mapping[str, int]], list[Exchange]]


@dataclass(frozen=True)
class Optimizer:
    """Hold the two pure functions that make an optimizer.

    Args:
      init: params -> opt_state, a pytree of arrays.
      update: (grads, opt_state, params, *, step, grad_scale=1.0) -> (new params, new opt_state),
        both with the structure, shapes and dtypes that they came with; `step` is an int32
        scalar, the number of updates done before this one, `grad_scale` a scalar that
        multiplies the gradients before all else. The engine gives no grad_scale, so that an
        `update` of your own may do without.
      per_example: whether `update` needs one gradient for each example of the global batch: each
        leaf with one dim more than its parameter, in front.
      handles_shards: whether `update` is right where a device holds only a part of a leaf: each
        element's update depends on that element alone, or on `tx.optim.global_norm` of the
        gradients.
      clips: whether it takes that norm, which sums the squares of the parts over devices.
      exchanges: what else it sends in a step: (shapes, PartitionSpecs, sizes of the mesh's axes) ->
        an `Exchange` for each collective. None: nothing.
      text: the call that made it ("sgd(0.02, momentum=0.9)"), for people to read.

    Example:
      >>> import jax.numpy as jnp
      >>> import txcore as tx
      >>> optimizer, params = tx.optim.sgd(0.5), {"w": jnp.ones(2)}
      >>> state = optimizer.init(params)
      >>> params, state = optimizer.update({"w": jnp.ones(2)}, state, params, step=jnp.int32(0))
      >>> params["w"].tolist()
      [0.5, 0.5]
    """

    init: Callable[[Params], OptState]
    update: Callable[..., tuple[Params, OptState]]
    per_example: bool = False
    handles_shards: bool = False
    clips: bool = False
    exchanges: Exchanges | None = None
    text: str = field(default="", compare=False)

    def __repr__(self) -> str:
        return self.text or f"Optimizer({self.init!r}, {self.update!r})"

    def as_optax(self) -> Any:
        """Make an optax GradientTransformation of this optimizer, to stand in optax's combinators.

        Its updates are the new parameters minus the old ones, in float32 or wider, and it counts
        its own steps. It is for parameters that are whole on every device: what optax puts around
        it (a norm, a mask, a lookahead) knows nothing of shards. A `clip_norm` clips what is left
        of the gradients by the transformations before it.

        Returns:
          An `optax.GradientTransformation`; its `update` needs `params`.

        Raises:
          ImportError: optax is not installed.
          ValueError: the optimizer takes one gradient for each example. From `update`: there are
            no parameters, or a device holds a part of the gradients.

        Example:
          >>> import optax
          >>> import txcore as tx
          >>> sgd = tx.optim.sgd(0.02, momentum=0.9).as_optax()
          >>> transformation = optax.chain(optax.add_noise(0.01, 0.55, jax.random.key(0)), sgd)
        """
        try:
            import optax
        except ImportError:
            raise ImportError(
                "as_optax needs optax, which is not installed: pip install 'txcore[optax]'"
            ) from None
        if self.per_example:
            raise ValueError(
                "as_optax needs an optimizer that takes one gradient for each parameter, got one "
                "that takes one for each example: use the optax transformation that it was made of"
            )
        return optax.GradientTransformation(
            lambda params: StepAndState(jnp.zeros((), jnp.int32), self.init(params)),
            partial(_optax_update, self),
        )


class StepAndState(NamedTuple):
    """The state of `Optimizer.as_optax`: the updates done, and the optimizer's own state."""

    step: jax.Array
    state: OptState


def _optax_update(
    optimizer: Optimizer,
    grads: Grads,
    state: StepAndState,
    params: Params | None = None,
    **extra: Any,
) -> tuple[PyTree, StepAndState]:
    """Return the changes of the parameters, as optax wants them."""
    del extra  # what other transformations of a chain are given
    if params is None:
        raise ValueError(
            "as_optax needs the parameters to update, got none: call update(grads, state, params)"
        )
    refuse_parts(
        "as_optax",
        grads,
        "give the tx.optim optimizer itself to the engine, which knows what is split",
    )
    new, inner = optimizer.update(grads, state.state, params, step=state.step)
    changes = jax.tree.map(lambda n, p: _widen(n) - _widen(p), new, params)
    return changes, StepAndState(state.step + 1, inner)


def scale_gradients(grads: Grads, grad_scale: ArrayLike) -> Grads:
    """Return the gradients times a scalar, in float32 or wider; a Python 1 leaves them alone."""
    if isinstance(grad_scale, int | float) and grad_scale == 1:
        return grads
    return jax.tree.map(lambda g: _widen(g) * jnp.asarray(grad_scale, _widen(g).dtype), grads)


def _widen(x: Any) -> jax.Array:
    return jnp.asarray(x, checks.accumulator(jnp.result_type(x)))


def zero_moments(op: str, params: Params) -> PyTree:
    """Return zeros like `params` in float32 or wider, or refuse what cannot be trained."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"{op}: every parameter needs a floating-point dtype, got "
                f"{jnp.result_type(leaf)} for params{jax.tree_util.keystr(path)}: keep what is "
                "not trained out of the parameters (engine.create_state takes it as extra=)"
            )
    return jax.tree.map(_zero_moment, params)


def _zero_moment(param: Any) -> jax.Array:
    dtype = checks.accumulator(jnp.result_type(param))
    zeros = jnp.zeros(jnp.shape(param), dtype)
    return varying.match_varying(zeros, param)[0]  # a shard's moment is a shard


def update_leaves(
    op: str, functions: LeafUpdates, params: Params, grads: Grads, *moments: PyTree
) -> tuple[PyTree, ...]:
    """Update every leaf by its own function: `function(param, grad, *moments)`.

    Args:
      op: the optimizer's name, for the errors.
      functions: for each leaf, a function that returns its new param and its new moments.
      params: the parameters.
      grads: the gradients.
      *moments: the trees of the optimizer's state.

    Returns:
      The new parameters and moments, with the structure of `params`.

    Raises:
      ValueError: a tree's leaves are not those of `params`, or differ in shape.
    """
    for what, tree in (("gradients", grads), *(("optimizer state", m) for m in moments)):
        check_like_params(op, what, tree, params)
    columns = [jax.tree.leaves(tree) for tree in (params, grads, *moments)]
    rows = [function(*row) for function, *row in zip(functions, *columns, strict=True)]
    structure = jax.tree.structure(params)
    return tuple(
        jax.tree.unflatten(structure, [row[i] for row in rows]) for i in range(1 + len(moments))
    )


def check_like_params(op: str, what: str, tree: PyTree, params: Params) -> None:
    """Refuse a tree whose leaves' paths or shapes differ from those of the parameters."""
    given, required = _shapes_by_path(tree), _shapes_by_path(params)
    if given == required:
        return
    for path in sorted(given.keys() ^ required.keys()):
        has, lacks = (what, "parameters") if path in given else ("parameters", what)
        raise ValueError(
            f"{op} needs {what} with the leaves of the parameters, got leaf {path or 'itself'} in "
            f"the {has} and not in the {lacks}: differentiate with respect to all the parameters "
            "that init was given"
        )
    path = next(path for path in given if given[path] != required[path])
    raise ValueError(
        f"{op} needs {what} with the shapes of the parameters, got leaf {path or 'itself'} with "
        f"{given[path]} where its parameter has {required[path]}: reduce gradients without "
        "changing their shape, and call init again when the parameters change"
    )


_PARTS = (
    "{op} needs gradients that are whole and equal on every device, got leaf {leaf} that varies "
    "along {axis}{source}: reduce it first (tx.pmean), or {remedy}"
)


def split_axes_of(tree: PyTree) -> list[tuple[str, ...]]:
    """Return for each leaf of a tree like the parameters the axes over which the plan splits it.

    The leaves of any other tree count as not split.
    """
    found = split_axes_like(tree)
    return [()] * len(jax.tree.leaves(tree)) if found is None else found


def refuse_parts(
    op: str, grads: Grads, remedy: str, *, known: Sequence[tuple[str, ...]] | None = None
) -> None:
    """Refuse gradients of which each device holds a part: their norm here is not the norm.

    Args:
      op: the optimizer's name, for the error.
      grads: the gradients.
      remedy: what to do instead of reducing them, for the error.
      known: for each leaf the axes over which it may be split.
    """
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    own = _own_axes()
    for i, (path, leaf) in enumerate(leaves):
        axes = sorted(_compat.varying_axes(leaf) - own - set(known[i] if known else ()))
        if axes:
            where = jax.tree_util.keystr(path) or "itself"
            names = ", ".join(axes)
            words = {"op": op, "leaf": where, "axis": names, "source": "", "remedy": remedy}
            raise ValueError(_PARTS.format(**words))


def refuse_unknown_parts(op: str, tree: PyTree) -> None:
    """Refuse a tree whose leaves may be parts, in a step whose plan splits parameters."""
    scope = current_scope()
    axes = split_axes(scope.layouts) if scope is not None else ()
    if not axes or split_axes_like(tree) is not None:
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts = [axis for axis in axes if axis in _compat.varying_axes(leaf)]
        if parts and not _compat.is_vmapped(leaf):
            where, names = jax.tree_util.keystr(path) or "itself", names_of(parts)
            raise ValueError(
                f"tx.optim.{op} needs a tree like state.params, to know which of its leaves the "
                f"plan splits, got one whose leaf {where} varies along {names}: give it all "
                f"gradients, or add the squares up yourself, tx.psum(jnp.sum(x**2), {names})"
            )


def claim_whole(op: str, grads: Grads, remedy: str) -> Grads:
    """Claim that gradients are whole and equal on every device, and return them; refuse parts.

    In a step the engine checks the claim by following the data, and the plan says which leaves
    are split. Outside a step the arrays' types decide. Under `jax.vmap` nothing is claimed: the
    gradients of one example are its own.
    """
    axes = _compat.bound_axes()
    if not axes or any(map(_compat.is_vmapped, jax.tree.leaves(grads))):
        return grads
    if current_scope() is None:
        refuse_parts(op, grads, remedy)
        return grads
    own = _own_axes()

    def claim_leaf(path: Any, leaf: Any, known: tuple[str, ...]) -> jax.Array:
        where = jax.tree_util.keystr(path) or "itself"
        words = {"axis": "{axis}", "source": " ({source})"}
        error = _PARTS.format(op=op, leaf=where, remedy=remedy, **words)
        equal = tuple(axis for axis in axes if axis not in own and axis not in known)
        return varying.claim(jnp.asarray(leaf), "equal", equal, what=where, error=error)

    leaves = jax.tree_util.tree_leaves_with_path(grads)
    claimed = [
        claim_leaf(path, leaf, known)
        for (path, leaf), known in zip(leaves, split_axes_of(grads), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(grads), claimed)


def _own_axes() -> frozenset[str]:
    """Return the axes along which a device's gradients are of the parameters that it has alone."""
    scope = current_scope()
    return frozenset(scope.own_axes) if scope is not None else frozenset()


def _shapes_by_path(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}
