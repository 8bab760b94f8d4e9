"""Megatron's f and g: where values that are equal on all devices enter a split layer, and leave it.

With varying axes tracked they are `tx.vary` and `tx.psum`, which are each other's transpose. With
check_vma=False jax transposes psum to psum, so there each brings its transpose with it.
"""

from functools import partial

import jax

from txcore import _compat
from txcore.collectives import _leaves
from txcore.collectives.psum import psum
from txcore.collectives.vary import vary
from txcore.step_scope import left_out_axes


def enter(x: jax.Array, axis: str | tuple[str, ...], *, name: str = "enter") -> jax.Array:
    """Hand a value that is equal on all devices to parts that each use it in their own way.

    Equation: `y[i] = x`. Megatron's f.

    Transpose: `psum` over `axis`, tagged `vary/name` (`psum/name` with check_vma=False): each part
    has its own share of the cotangent.

    Args:
      x: any shape, the same on every device along `axis`. What varies along it already is left as
        it is: the operation that made it varying has the sum in its transpose.
      axis: mesh axis name, or a tuple of names.
      name: label of the operation's tag.

    Returns:
      `x`, typed as varying along `axis`.

    Raises:
      NameError: `axis` is not bound here.

    Example:
      >>> def product(x, w):  # sum_i x * w_i
      ...     return tx.tensor.leave(tx.tensor.enter(x, "model") * w[0], "model")
      >>> x, w = np.float32(1), np.array([2.0, 3.0], np.float32)
      >>> tx.testing.run_sharded(
      ...     jax.grad(product), x, w, axes={"model": 2}, in_specs=(P(), P("model")), out_specs=P())
      array(5., dtype=float32)

    References:
      Shoeybi et al., Megatron-LM, 2019, section 3.
    """
    axes = split_axes("tensor.enter", axis)
    if are_tracked(axes):
        return vary(x, axes, name=name) if axes else x
    return _enter_untracked(x, axes, name)


def leave(x: jax.Array, axis: str | tuple[str, ...], *, name: str = "leave") -> jax.Array:
    """Add up the parts of a value, of which each device has computed one.

    Equation: `y[i] = sum_j x[j]`. Megatron's g.

    Transpose: identity, also with check_vma=False: the cotangent is the same on every device, and
    each part takes all of it.

    Args:
      x: any shape; each device's own part of the sum.
      axis: mesh axis name, or a tuple of names.
      name: label of the operation's tag, `psum/name`.

    Returns:
      The sum, the same on every device along `axis`.

    Raises:
      ValueError: `x` does not vary along `axis`.
      NameError: `axis` is not bound here.

    Example:
      >>> def f(x):
      ...     return tx.tensor.leave(x, "model")
      >>> tx.testing.run_sharded(f, np.arange(4.0), axes={"model": 2}, out_specs=P())
      array([2., 4.], dtype=float32)

    References:
      Shoeybi et al., Megatron-LM, 2019, section 3.
    """
    axes = split_axes("tensor.leave", axis)
    if are_tracked(axes):
        return psum(x, axes, name=name) if axes else x
    return _leave_untracked(x, axes, name)


def split_axes(op: str, axis: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the axes over which a layer is split, without those that the engine leaves out."""
    return tuple(a for a in _leaves.check_axes(op, axis) if a not in left_out_axes())


def are_tracked(axes: tuple[str, ...]) -> bool:
    """Tell whether jax tracks along which of these axes a value varies."""
    return all(_compat.tracks_varying(axis) for axis in axes)


def check_part(op: str, what: str, x: jax.Array, axes: tuple[str, ...], dim: int) -> None:
    """Refuse a parameter that is the same on every device, where each is to hold its part.

    Raises:
      ValueError: it does not vary along an axis of more than one device.
    """
    for axis in axes:
        if _compat.axis_size(axis) != 1 and _leaves.varies_along(x, axis) is False:
            spec = ", ".join([*["None"] * dim, repr(axis)])
            raise ValueError(
                f"{op} needs {what} this device's part along {axis!r}, got the same array on every "
                f"device, shape {x.shape}: store it in parts, by TP({axis!r}, rules={{path: "
                f"{dim - x.ndim}}}) in the plan, or PartitionSpec({spec}) in in_specs="
            )


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _enter_untracked(x: jax.Array, axes: tuple[str, ...], name: str) -> jax.Array:
    return x


def _enter_forward(x: jax.Array, axes: tuple[str, ...], name: str) -> tuple[jax.Array, None]:
    return x, None


def _enter_backward(
    axes: tuple[str, ...], name: str, _: None, cotangent: jax.Array
) -> tuple[jax.Array]:
    return (psum(cotangent, axes, name=name),)


_enter_untracked.defvjp(_enter_forward, _enter_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _leave_untracked(x: jax.Array, axes: tuple[str, ...], name: str) -> jax.Array:
    return psum(x, axes, name=name)


def _leave_forward(x: jax.Array, axes: tuple[str, ...], name: str) -> tuple[jax.Array, None]:
    return psum(x, axes, name=name), None


def _leave_backward(
    axes: tuple[str, ...], name: str, _: None, cotangent: jax.Array
) -> tuple[jax.Array]:
    return (cotangent,)


_leave_untracked.defvjp(_leave_forward, _leave_backward)
