"""value_and_grad and grad that keep the gradient reduction explicit."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from txcore.collectives import _leaves, axis_size, vary
from txcore.collectives._scope import current_scope

Axis = str | tuple[str, ...]


def value_and_grad(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: bool = False,
    axis: Axis | None = None,
) -> Callable[..., Any]:
    """Differentiate a local loss; gradients come out local, for you to reduce once.

    The differentiated arguments are cast to vary along the data axes first, so that autodiff
    inserts no reduction of its own (`jax.grad` of replicated arguments returns gradients
    that are summed already).

    Args:
      f: function that returns a scalar loss (or `(loss, aux)`) of this device's examples.
      argnums: which arguments to differentiate.
      has_aux: whether `f` returns `(loss, aux)`.
      axis: the data axes; inside a step they are the plan's and need not be named.

    Returns:
      A function that returns `(loss, gradients)`, or `((loss, aux), gradients)`; both vary
      along the data axes.

    Raises:
      ValueError: the loss is already reduced along a data axis (averaging its gradients on
        top would give 1/N of the truth), or no data axes are known.

    Example:
      >>> def f(w, x):
      ...     loss, g = tx.value_and_grad(lambda w: jax.numpy.mean(w * x), axis="data")(w)
      ...     return tx.pmean(g, "data")
      >>> tx.testing.run_sharded(
      ...     f, np.float32(3), np.arange(4.0), axes={"data": 4}, in_specs=(P(), P("data")),
      ...     out_specs=P())
      array(1.5, dtype=float32)
    """

    def checked(*args: Any, **kwargs: Any) -> Any:
        out = f(*args, **kwargs)
        _check_local(out[0] if has_aux else out, _data_axes(axis))
        return out

    differentiated = jax.value_and_grad(checked, argnums, has_aux=has_aux)
    nums = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        axes = _data_axes(axis)
        if not args:
            raise TypeError(
                "tx.value_and_grad needs the arguments to differentiate by position, got keyword "
                f"arguments only: {', '.join(kwargs) or 'none'}"
            )
        if axes:
            at = {n % len(args) for n in nums}
            args = tuple(vary(a, axes, name="params") if i in at else a for i, a in enumerate(args))
        return differentiated(*args, **kwargs)

    return wrapped


def grad(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: bool = False,
    axis: Axis | None = None,
) -> Callable[..., Any]:
    """Differentiate a local loss like `value_and_grad`, without returning the loss.

    Args:
      f: as for `value_and_grad`.
      argnums: as for `value_and_grad`.
      has_aux: as for `value_and_grad`.
      axis: as for `value_and_grad`.

    Returns:
      A function that returns the gradients, or `(gradients, aux)`.

    Raises:
      ValueError: as `value_and_grad`.

    Example:
      >>> def f(x):
      ...     return tx.grad(lambda x: jax.numpy.sum(x * x), axis="data")(x)
      >>> tx.testing.run_sharded(f, np.arange(4.0), axes={"data": 4})
      array([0., 2., 4., 6.], dtype=float32)
    """
    both = value_and_grad(f, argnums, has_aux=has_aux, axis=axis)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        value, gradients = both(*args, **kwargs)
        return (gradients, value[1]) if has_aux else gradients

    return wrapped


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


def _check_local(loss: Any, axes: tuple[str, ...]) -> None:
    for a in axes:
        if _leaves.varies(jax.numpy.asarray(loss), a) is False:
            raise ValueError(
                f"tx.value_and_grad needs a loss that is local along data axis {a!r}, but the loss "
                f"does not vary along it: it is reduced or gathered already, and tx.pmean of "
                f"its gradients would give 1/{axis_size(a)} of the truth. Return the local loss, "
                f"and apply tx.pmean(..., {a!r}) to loss and gradients afterwards"
            )
