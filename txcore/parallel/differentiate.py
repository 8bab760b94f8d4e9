"""value_and_grad and grad that keep the gradient reduction explicit."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from txcore.collectives import _leaves, axis_size, vary
from txcore.kernels.common import checks
from txcore.parallel import zero
from txcore.parallel.microbatches import Loop, accumulate
from txcore.step_scope import current_scope

Axis = str | tuple[str, ...]


def value_and_grad(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: bool = False,
    axis: Axis | None = None,
    loss_scale: jax.Array | float | None = None,
    microbatches: int | None = None,
    carry: int | None = None,
) -> Callable[..., Any]:
    """Differentiate a local loss; gradients come out local, for you to reduce once.

    The differentiated arguments are cast to vary along the data axes first, so that autodiff
    inserts no reduction of its own (`jax.grad` of replicated arguments returns gradients
    that are summed already).

    With `loss_scale` the loss is multiplied by it, in float32 or wider, before it is
    differentiated, and the gradients are divided by it again. Only inside the backward pass are
    they scaled: what comes out is float32, so that nothing is lost by unscaling at once, and
    means the same in every precision to whoever clips, logs or accumulates it. A gradient that
    overflowed stays inf or nan.

    With `microbatches` the batch is computed in so many parts, one after the other, for the
    memory of one: all arguments that are not differentiated are split along their first dim. The
    result is that of the whole batch, where the loss is a mean over examples: the parts' losses
    and gradients are averaged, added up in float32 or wider, and `tx.example_mean` of a part has
    the count of the whole batch, masked or not. Nothing is sent within the loop, and the
    gradients are yours to reduce once, after it.

    Args:
      f: function that returns a scalar loss (or `(loss, aux)`) of this device's examples.
      argnums: which arguments to differentiate.
      has_aux: whether `f` returns `(loss, aux)`.
      axis: the data axes; inside a step they are the plan's and need not be named.
      loss_scale: `state.loss_scale`, which a step in float16 needs and which is None in others;
        elsewhere any number above 0.
      microbatches: how many parts the examples of this device are split into, a divisor of their
        number; None computes all at once.
      carry: which argument is not split, but is what the microbatch before returned as `aux`, to
        begin with the one given (batch statistics); needs `microbatches` and `has_aux`. None: none.

    Returns:
      A function that returns `(loss, gradients)`, or `((loss, aux), gradients)`; both vary
      along the data axes, and neither is scaled. With `microbatches` the aux is that of the last
      one where it is carried; else those of all, in a dim more in front.

    Raises:
      ValueError: the loss is already reduced along a data axis (averaging its gradients on
        top would give 1/N of the truth), no data axes are known, or a step in float16 passes no
        loss_scale; `microbatches` is no count, or does not divide what it splits.
      TypeError: loss_scale is no scalar; or, with one, the loss is not floating-point or the
        gradients would come out in float16.

    Example:
      >>> def f(w, x):
      ...     loss, g = tx.value_and_grad(lambda w: jax.numpy.mean(w * x), axis="data")(w)
      ...     return tx.pmean(g, "data")
      >>> tx.testing.run_sharded(
      ...     f, np.float32(3), np.arange(4.0), axes={"data": 4}, in_specs=(P(), P("data")),
      ...     out_specs=P())
      array(1.5, dtype=float32)

    References:
      Micikevicius et al., "Mixed precision training", 2018, section 3.2 (loss scaling).
    """
    check_scale(loss_scale)
    nums = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    _check_microbatches(microbatches, carry, nums, has_aux)
    # An example weighs more in the mean of a part: of the whole batch no gradient overflows more.
    scale = loss_scale if loss_scale is None else loss_scale / (microbatches or 1)

    def loss_of(*args: Any, **kwargs: Any) -> Any:
        return zero.call_with_views(f, args, kwargs)

    def checked(*args: Any, **kwargs: Any) -> Any:
        out = loss_of(*args, **kwargs)
        loss, aux = out if has_aux else (out, None)
        loss = _check_local_loss(loss, _data_axes(axis))
        if scale is not None:
            return _scale_loss(loss, scale), (loss, aux)
        return (loss, aux) if has_aux else loss

    scaled = scale is not None
    differentiated = jax.value_and_grad(checked, argnums, has_aux=has_aux or scaled)

    def one(*args: Any, **kwargs: Any) -> Any:
        value, gradients = differentiated(*args, **kwargs)
        gradients = zero.parts_of(gradients)
        if not scaled:
            return value, gradients
        loss, aux = value[1]
        return (loss, aux) if has_aux else loss, unscale(gradients, scale)

    def one_part(*args: Any, **kwargs: Any) -> Any:
        value, gradients = one(*args, **kwargs)
        return value, zero.scatter_early(gradients)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        axes = _data_axes(axis)
        check_needed_scale(loss_scale)
        if not args:
            raise TypeError(
                "tx.value_and_grad needs the arguments to differentiate by position, got keyword "
                f"arguments only: {', '.join(kwargs) or 'none'}"
            )
        at = frozenset(n % len(args) for n in nums)
        if axes:
            args = tuple(_cast_params(a, axes) if i in at else a for i, a in enumerate(args))
        if microbatches is None:
            return one(*args, **kwargs)
        place = _place_of_carry(carry, at, len(args))
        loop = Loop(microbatches, at, place, has_aux, _row_axes(axes))
        return accumulate(one_part, loss_of, loop, args, kwargs)

    return wrapped


def grad(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: bool = False,
    axis: Axis | None = None,
    loss_scale: jax.Array | float | None = None,
    microbatches: int | None = None,
    carry: int | None = None,
) -> Callable[..., Any]:
    """Differentiate a local loss like `value_and_grad`, without returning the loss.

    Args:
      f: as for `value_and_grad`.
      argnums: as for `value_and_grad`.
      has_aux: as for `value_and_grad`.
      axis: as for `value_and_grad`.
      loss_scale: as for `value_and_grad`.
      microbatches: as for `value_and_grad`.
      carry: as for `value_and_grad`.

    Returns:
      A function that returns the gradients, or `(gradients, aux)`.

    Raises:
      ValueError, TypeError: as `value_and_grad`.

    Example:
      >>> def f(x):
      ...     return tx.grad(lambda x: jax.numpy.sum(x * x), axis="data")(x)
      >>> tx.testing.run_sharded(f, np.arange(4.0), axes={"data": 4})
      array([0., 2., 4., 6.], dtype=float32)
    """
    both = value_and_grad(
        f,
        argnums,
        has_aux=has_aux,
        axis=axis,
        loss_scale=loss_scale,
        microbatches=microbatches,
        carry=carry,
    )

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        value, gradients = both(*args, **kwargs)
        return (gradients, value[1]) if has_aux else gradients

    return wrapped


def _cast_params(tree: Any, axes: tuple[str, ...]) -> Any:
    """Return parameters cast to vary, with handles for those of which a device stores a part."""

    def one(x: Any) -> Any:
        return x if zero.is_shard(x) else vary(x, axes, name="params")

    found = zero.find_views(tree)
    if not any(map(zero.is_shard, jax.tree.leaves(found, is_leaf=zero.is_shard))):
        return vary(tree, axes, name="params")
    return jax.tree.map(one, found, is_leaf=zero.is_shard)


def _data_axes(axis: Axis | None) -> tuple[str, ...]:
    """Return the data axes with more than one device."""
    scope = current_scope()
    if axis is None and scope is not None:
        return scope.data_axes
    if axis is None:
        raise ValueError(
            "tx.value_and_grad needs axis= the data axes outside a step decorated with "
            "@tx.step_fn (inside one they are the plan's)"
        )
    return tuple(a for a in _leaves.check_axes("value_and_grad", axis) if axis_size(a) > 1)


def _row_axes(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the axes over which rows are split: inside a step, all but the context axis."""
    scope = current_scope()
    if scope is None:
        return axes
    return tuple(a for a in axes if a in scope.row_axes or a not in scope.data_axes)


def _check_local_loss(loss: Any, axes: tuple[str, ...]) -> jax.Array:
    """Return a loss that is local along the data axes; refuse one that is equal there."""
    loss = jnp.asarray(loss)
    _refuse_layers_of_a_stage(loss)
    for a in axes:
        if _leaves.varies_along(loss, a) is False:
            error = (
                f"tx.value_and_grad needs a loss that is local along data axis {a!r}, but the loss "
                f"does not vary along it ({{source}}): it is reduced or gathered already, and "
                f"tx.pmean of its gradients would give 1/{axis_size(a)} of the truth. Return the "
                f"local loss, and apply tx.pmean(..., {a!r}) to loss and gradients afterwards"
            )
            loss = _leaves.claim_differs(loss, a, what="the loss", error=error)
    return loss


def _refuse_layers_of_a_stage(loss: jax.Array) -> None:
    """Refuse a loss that is made of the layers which one stage of the plan's pipeline has."""
    scope = current_scope()
    if scope is None or scope.pipeline is None or scope.pipeline.axis in scope.left_out:
        return
    axis = scope.pipeline.axis
    if _leaves.varies_along(loss, axis):
        raise ValueError(
            f"tx.value_and_grad needs a loss that is the same along the pipe axis {axis!r}, got "
            "one that varies along it: each device there has other layers. Write "
            "tx.pipeline.value_and_grad(first, block, last)(state.params, batch), which runs the "
            "batch through all of them"
        )


def _check_microbatches(
    microbatches: Any, carry: Any, differentiated: Sequence[int], has_aux: bool
) -> None:
    if microbatches is not None and (checks.whole_number(microbatches) or 0) < 1:
        raise ValueError(
            f"tx.value_and_grad needs microbatches= a count from 1 on, got {microbatches!r}"
        )
    if carry is None:
        return
    if microbatches is None or not has_aux or checks.whole_number(carry) is None:
        raise ValueError(
            "tx.value_and_grad needs carry= the place of an argument, with microbatches= and "
            f"has_aux=True, whose aux is the argument's next value, got carry={carry!r}, "
            f"microbatches={microbatches!r} and has_aux={has_aux}"
        )
    if carry in differentiated:
        raise ValueError(
            f"tx.value_and_grad needs carry= an argument that is not differentiated, got {carry}"
        )


def _place_of_carry(carry: int | None, differentiated: frozenset[int], count: int) -> int | None:
    if carry is None:
        return None
    place = carry + count if carry < 0 else carry
    if place not in range(count) or place in differentiated:
        raise ValueError(
            f"tx.value_and_grad needs carry= one of the {count} arguments that is not "
            f"differentiated, got {carry}"
        )
    return place


def check_scale(loss_scale: Any) -> None:
    """Refuse what is no loss scale."""
    if isinstance(loss_scale, (int, float)) and not isinstance(loss_scale, bool):
        usable = 0 < loss_scale < float("inf")
    elif isinstance(loss_scale, (jax.Array, np.ndarray, np.generic)):
        usable = loss_scale.shape == () and jnp.issubdtype(loss_scale.dtype, jnp.floating)
    else:
        usable = loss_scale is None
    if not usable:
        raise TypeError(
            "tx.value_and_grad needs loss_scale= state.loss_scale, or another floating-point "
            f"scalar above 0, got {loss_scale!r}"
        )


def check_needed_scale(loss_scale: Any, op: str = "value_and_grad(f") -> None:
    """Refuse a step in float16 without a loss scale."""
    scope = current_scope()
    if loss_scale is None and scope is not None and scope.scales_loss:
        raise ValueError(
            f"a step in float16 needs tx.{op}, loss_scale=state.loss_scale) (or tx.grad "
            "with it), got no loss_scale: gradients below 6e-8 would come out as zeros. The same "
            "line works in every precision"
        )


def _scale_loss(loss: Any, loss_scale: Any) -> jax.Array:
    loss = jnp.asarray(loss)
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(f"tx.value_and_grad needs a floating-point loss to scale, got {loss.dtype}")
    # A loss of 3 times a scale of 65536 is more than float16 holds.
    wide = checks.accumulator(loss.dtype)
    return loss.astype(wide) * jnp.asarray(loss_scale, wide)


def unscale(gradients: Any, loss_scale: Any) -> Any:
    """Divide gradients by the scale of their loss; refuse float16, which would lose them."""
    check_unscalable(gradients)

    def one(gradient: jax.Array) -> jax.Array:
        wide = checks.accumulator(gradient.dtype)
        return (gradient.astype(wide) / jnp.asarray(loss_scale, wide)).astype(gradient.dtype)

    return jax.tree.map(one, gradients)


def check_unscalable(gradients: Any) -> None:
    """Refuse gradients (or parameters) in float16, whose unscaled gradients it does not hold."""
    for path, gradient in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        if gradient.dtype == jnp.float16:
            raise TypeError(
                "tx.value_and_grad needs arguments in float32 to unscale their gradients without "
                f"loss, got float16 at {jax.tree_util.keystr(path) or 'the argument'}: keep the "
                "parameters in float32, and cast them inside the function that is differentiated, "
                "by state.precision.cast(params)"
            )
