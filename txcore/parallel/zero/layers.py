"""Gather a layer at a time, forward and backward, and keep none of it for the other."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from txcore import _compat
from txcore.parallel.microbatches import current_part
from txcore.parallel.zero.order import after
from txcore.parallel.zero.shard import gather, gather_together, is_shard, is_view
from txcore.step_scope import current_scope

# What is cheap is made again in the backward pass: a cast of gathered parameters that was kept
# would be as large as they are.
_MADE_AGAIN = frozenset(
    ("all_gather", "name", "claim", "pvary", "pcast", "convert_element_type", "reshape", "squeeze")
    + (
        "transpose",
        "broadcast_in_dim",
        "expand_dims",
        "slice",
        "rev",
        "copy",
        "optimization_barrier",
    )
)


def keep_but_gathered(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """Tell `jax.checkpoint` to keep all but gathered parameters, and what only moves or casts."""
    return primitive.name not in _MADE_AGAIN and not _only_gathers(parameters)


def _only_gathers(parameters: Mapping[str, Any]) -> bool:
    """Tell whether an operation is a call of nothing but gathers, as `gather`'s own is."""
    bodies = [getattr(value, "jaxpr", value) for value in parameters.values()]
    names = [eqn.primitive.name for body in bodies for eqn in getattr(body, "eqns", ())]
    return "all_gather" in names and _MADE_AGAIN.issuperset(names)


def _gather_again(f: Callable[..., Any], *, prevent_cse: bool = True) -> Callable[..., Any]:
    """Make a backward pass gather again what `f` gathers, unless the plan keeps that."""
    scope, part = current_scope(), current_part()
    if scope is not None and not scope.regathers:
        return f
    if part is not None and part.is_trial:  # nothing of it is run, and counts are to be found
        return f
    return jax.checkpoint(f, policy=keep_but_gathered, prevent_cse=prevent_cse)


def _gather_from(called: Any) -> Callable[[Any], Any]:
    """Return `gather` as if it were called from there, which an audit then shows."""

    def gather_here(shards: Any) -> Any:
        with _compat.called_from(called):
            return gather(shards)

    return gather_here


def layer(f: Callable[..., Any]) -> Callable[..., Any]:
    """Make a layer gather its parameters when it runs, and again in the backward pass.

    Equation: `f(gather(shards), *args)`. Transpose: that of `tx.zero.gather`. The gather waits
    until the layer's other arguments are there, and the one for the backward pass until the
    gradient of what the layer returns is. What the layer computes is kept in between, its gathered
    parameters are not: each device holds the whole of one layer at a time. In a `lax.scan` over a
    stack of layers too. Where no parameter is in parts, it is `f` itself.

    Args:
      f: `(params, *args) -> anything`, of whole parameters; arrays that it takes from outside have
        gradients too.

    Returns:
      The same function of handles: `state.shards`, or a part of that tree.

    Raises:
      ValueError: when it is called, as `tx.zero.gather`.

    Example:
      >>> def f(w, x):
      ...     shard = tx.zero.Shard(w, -1, ("data",), "w")
      ...     block = tx.zero.layer(lambda w, x: w * x)
      ...     return jax.grad(lambda s: block(s, x[0]).sum())(shard).part
      >>> tx.testing.run_sharded(f, np.ones(4), np.array([1.0, 3.0]), axes={"data": 2})
      array([2., 2., 2., 2.], dtype=float32)

    References:
      Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models",
      2020 (stage 3); PyTorch's `fully_shard(reshard_after_forward=True)`.
    """

    def run(shards: Any, *args: Any) -> Any:
        part = current_part()
        if not any(map(is_shard, jax.tree.leaves(shards, is_leaf=is_shard))):
            return f(shards, *args)
        if part is not None and part.is_trial:
            return f(gather(shards), *args)
        leaves, structure = jax.tree.flatten(args)
        places = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]

        def call(params: Any, arrays: list[Any]) -> Any:
            given = dict(zip(places, arrays, strict=True))
            own = [given.get(i, x) for i, x in enumerate(leaves)]
            return f(params, *jax.tree.unflatten(structure, own))

        arrays = [leaves[i] for i in places]
        return _run_layers(call, [_wait_for(shards, lax.stop_gradient(arrays))], arrays)

    return run


def call_with_views(f: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Call a function with whole parameters in place of the handles that stand for them."""
    leaves = jax.tree.leaves(args, is_leaf=is_view)
    treedef: Any = jax.tree.structure(args, is_leaf=is_view)
    views = [leaf for leaf in leaves if is_view(leaf)]
    if not views:
        return f(*args, **options)

    called = _compat.current_traceback()

    def run(views: list[Any]) -> Any:
        with _compat.called_from(called):
            whole = iter(gather_together(views, ""))
        given = treedef.unflatten([next(whole) if is_view(leaf) else leaf for leaf in leaves])
        return f(*given, **options)

    return _gather_again(run)(views)


def layers(f: Callable[[Any, Any], Any], shards: Sequence[Any], x: Any) -> Any:
    """Run layers one after the other; gather the next one's parameters while one computes.

    Equation: `x = f(gather(shards[i]), x)` for each i. The gather of a layer may begin when the
    layer before begins, and not earlier, forward and backward (where "before" is the one above):
    each device holds the whole of two layers at most. What the layers compute is kept for the
    backward pass, their gathered parameters are not.

    Args:
      f: `(params, x) -> x`, of one layer's whole parameters.
      shards: for each layer the handles of its parameters, part of `state.shards`.
      x: pytree of arrays that goes through the layers; `f` returns one like it.

    Returns:
      What the last layer returns.

    Raises:
      TypeError: the layers are no list or tuple.
      ValueError: `f` returns another structure than it is given.

    Example:
      >>> def f(w, x):
      ...     shards = [tx.zero.Shard(w, -1, ("data",), "w")] * 2
      ...     return tx.zero.layers(lambda w, x: w * x, shards, x)
      >>> tx.testing.run_sharded(f, np.array([2.0, 3.0]), np.ones((4, 2)), axes={"data": 2})[0]
      array([4., 9.], dtype=float32)
    """
    if not isinstance(shards, list | tuple):
        raise TypeError(
            "tx.zero.layers needs a list or tuple, with the parameters of one layer in each place, "
            f"got {type(shards).__name__}: for a stack of layers in one array use tx.zero.layer "
            "inside of lax.scan"
        )
    if not shards:
        return x
    return _run_layers(f, list(shards), x)


def _run_layers(f: Callable[[Any, Any], Any], shards: list[Any], x: Any) -> Any:
    whole = jax.eval_shape(gather, shards[0])
    converted, constants = jax.closure_convert(f, whole, x)  # autodiff sees no closure in _run
    return _run(converted, shards, x, constants)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(f: Callable[..., Any], shards: list[Any], x: Any, constants: list[Any]) -> Any:
    return _run_forward(f, shards, x, constants)[0]


def _run_forward(
    f: Callable[..., Any], shards: list[Any], x: Any, constants: list[Any]
) -> tuple[Any, list[tuple[Any, Any]]]:
    """Return what the last layer returns, and of each layer what pulls a cotangent back."""
    gather_here = _gather_from(_compat.current_traceback())
    pulls, before = [], None
    for own in shards:
        # The layer before has what it begins with when this gather may begin.
        later = own if before is None else after(own, before)
        before = x

        def one(own: Any, x: Any, constants: list[Any]) -> Any:
            return f(gather_here(own), x, *constants)

        x, pull = jax.vjp(_gather_again(one, prevent_cse=False), later, x, constants)
        pulls.append((pull, later))
    return x, pulls


def _run_backward(
    f: Callable[..., Any], pulls: list[tuple[Any, Any]], cotangent: Any
) -> tuple[Any, Any, Any]:
    del f
    of_shards: list[Any] = []
    of_constants, before = None, None
    for pull, shards in reversed(pulls):
        # As above. The first one waits too: what it gathered forward is not to be kept for it.
        pull = _gather_after(pull, shards, cotangent if before is None else before)
        before = cotangent
        own, cotangent, added = pull(cotangent)
        of_shards.insert(0, own)
        of_constants = added if of_constants is None else jax.tree.map(jnp.add, of_constants, added)
    return of_shards, cotangent, of_constants


def _gather_after(pull: Any, shards: Any, other: Any) -> Any:
    """Return what pulls a cotangent back, whose gathers wait for another tree."""
    own = {id(leaf) for leaf in jax.tree.leaves(shards)}
    leaves, structure = jax.tree.flatten(pull)
    places = [i for i, leaf in enumerate(leaves) if id(leaf) in own]
    if not places:  # then all that the backward pass has kept waits
        return after(pull, other)
    for i, leaf in zip(places, after([leaves[i] for i in places], other), strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)


_run.defvjp(_run_forward, _run_backward)


@jax.custom_vjp
def _wait_for(tree: Any, other: Any) -> Any:
    """Return a tree that is not there before another one is; gradients of it do not wait."""
    return after(tree, other)


_wait_for.defvjp(lambda tree, other: (after(tree, other), None), lambda _, given: (given, None))
