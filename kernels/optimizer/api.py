"""The public updates: what they take and what they refuse."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from txcore import varying
from txcore.kernels.common import checks
from txcore.kernels.dispatch import registry
from txcore.kernels.optimizer import equations, jax_triton_updates, mosaic, pallas, xla

INFINITY = float("inf")
SGD_MOMENTUM: registry.Kernels = {
    "xla": registry.Kernel(xla.sgd_momentum),
    "pallas_triton": registry.Kernel(
        pallas.sgd_momentum, pallas.list_configs, pallas.explain_refusal
    ),
    "mosaic_tpu": registry.Kernel(mosaic.sgd_momentum, mosaic.list_configs, mosaic.explain_refusal),
    "jax_triton": registry.Kernel(
        jax_triton_updates.sgd_momentum,
        jax_triton_updates.list_configs,
        jax_triton_updates.explain_refusal,
    ),
}
ADAMW: registry.Kernels = {
    "xla": registry.Kernel(xla.adamw),
    "pallas_triton": registry.Kernel(pallas.adamw, pallas.list_configs, pallas.explain_refusal),
    "mosaic_tpu": registry.Kernel(mosaic.adamw, mosaic.list_configs, mosaic.explain_refusal),
    "jax_triton": registry.Kernel(
        jax_triton_updates.adamw,
        jax_triton_updates.list_configs,
        jax_triton_updates.explain_refusal,
    ),
}


def sgd_momentum(
    param: ArrayLike,
    grad: ArrayLike,
    velocity: ArrayLike,
    *,
    learning_rate: ArrayLike,
    momentum: float,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    grad_scale: ArrayLike = 1.0,
    cast: DTypeLike | None = None,
    implementation: registry.Implementation | None = None,
    config: Any = None,
) -> tuple[jax.Array, ...]:
    """Update an array by stochastic gradient descent with momentum.

    With d = grad_scale * grad + weight_decay * param: velocity' = momentum * velocity + d, and
    param' = param - learning_rate * velocity' (with `nesterov`: ... * (d + momentum *
    velocity')), as PyTorch and optax define it. It is computed in float32 or wider, and each
    result is rounded once. An element that is not finite affects no other element.

    In float32 one pass moves 20 bytes for each parameter: it reads 12 and writes 8, in place where
    param and velocity are donated. XLA on CPU makes two passes and moves 24 bytes: 28 with
    `nesterov` or a weight decay, and with both 40 and 4 bytes more of memory.

    Args:
      param: any shape and floating dtype.
      grad: param's shape, any floating dtype.
      velocity: param's shape, any floating dtype; zeros before the first update.
      learning_rate: scalar, a number or an array.
      momentum: in [0, 1).
      nesterov: whether to look ahead along the new velocity.
      weight_decay: L2 coefficient added to the gradient, at least 0.
      grad_scale: scalar, a number or an array, that multiplies the gradient before all else: the
        inverse of a loss scale, a clipping factor (see `squared_norm`), or their product.
      cast: floating dtype of a second copy of the new param, for the next forward pass; None
        returns no copy.
      implementation: None for the fastest known, or a back end by name: "xla", or "pallas" for the
        platform's Pallas kernel (not differentiable).
      config: a configuration of the named implementation; None for its best guess.

    Returns:
      The new param and velocity, in their own dtypes, and with `cast` the copy in that dtype.

    Raises:
      TypeError: an array or `cast` is not floating-point, or `config` is another
        implementation's.
      ValueError: the shapes differ, a number is out of its range, there is no implementation of
        that name, or a config is given without one.
      NotImplementedError: the implementation cannot run this.

    Example:
      >>> import jax.numpy as jnp
      >>> from txcore import kernels
      >>> ones, zeros = jnp.ones(3), jnp.zeros(3)
      >>> new, _ = kernels.sgd_momentum(ones, ones, zeros, learning_rate=0.5, momentum=0.9)
      >>> new.tolist()
      [0.5, 0.5, 0.5]

    References:
      Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013.
    """
    op = "sgd_momentum"
    param, grad, velocity = checks.require_floats(op, param=param, grad=grad, velocity=velocity)
    _check_shapes(op, param=param, grad=grad, velocity=velocity)
    checks.require_in_range(op, "learning_rate", learning_rate, 0, INFINITY)
    checks.require_in_range(op, "momentum", momentum, 0, 1)
    checks.require_in_range(op, "weight_decay", weight_decay, 0, INFINITY)
    arrays = (param, grad, velocity)
    wide = _wide_dtype(*arrays)
    return registry.run_op(
        op,
        SGD_MOMENTUM,
        *varying.match_varying(
            *arrays,
            _require_scalar(op, "learning_rate", learning_rate, wide),
            _require_scalar(op, "grad_scale", grad_scale, wide),
        ),
        implementation=implementation,
        config=config,
        dtypes=_result_dtypes(op, cast, param, velocity),
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
    )


def adamw(
    param: ArrayLike,
    grad: ArrayLike,
    m: ArrayLike,
    v: ArrayLike,
    *,
    step: ArrayLike,
    learning_rate: ArrayLike,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    grad_scale: ArrayLike = 1.0,
    cast: DTypeLike | None = None,
    implementation: registry.Implementation | None = None,
    config: Any = None,
) -> tuple[jax.Array, ...]:
    """Update an array by Adam with decoupled weight decay.

    With g = grad_scale * grad: m' = b1 m + (1 - b1) g, v' = b2 v + (1 - b2) g^2, and param' =
    param - learning_rate * (mhat / (sqrt(vhat) + eps) + weight_decay * param), where mhat = m' /
    (1 - b1^t), vhat = v' / (1 - b2^t), t = step + 1. It is computed in float32 or wider, and each
    result is rounded once. An element that is not finite affects no other element.

    In float32 one pass moves 28 bytes for each parameter: it reads 16 and writes 12, in place
    where param, m and v are donated.

    Args:
      param: any shape and floating dtype.
      grad: param's shape, any floating dtype.
      m: first moment, param's shape, any floating dtype; zeros before the first update.
      v: second moment, like m (bfloat16 is too coarse for it: a change of 0.1% is lost).
      step: int32 scalar, the number of updates done before this one.
      learning_rate: scalar, a number or an array.
      b1: decay of m, in [0, 1).
      b2: decay of v, in [0, 1).
      eps: added to the root of vhat, at least 0.
      weight_decay: at least 0.
      grad_scale: scalar, a number or an array, that multiplies the gradient before all else: the
        inverse of a loss scale, a clipping factor (see `squared_norm`), or their product.
      cast: floating dtype of a second copy of the new param, for the next forward pass; None
        returns no copy.
      implementation: None for the fastest known, or a back end by name: "xla", or "pallas" for the
        platform's Pallas kernel (not differentiable).
      config: a configuration of the named implementation; None for its best guess.

    Returns:
      The new param, m and v, in their own dtypes, and with `cast` the copy in that dtype.

    Raises:
      TypeError: an array or `cast` is not floating-point, or `config` is another
        implementation's.
      ValueError: the shapes differ, a number is out of its range, there is no implementation of
        that name, or a config is given without one.
      NotImplementedError: the implementation cannot run this.

    Example:
      >>> import jax.numpy as jnp
      >>> from txcore import kernels
      >>> one, zero = jnp.ones(()), jnp.zeros(())
      >>> new, m, v = kernels.adamw(
      ...     one, 4 * one, zero, zero, step=0, learning_rate=0.5,
      ...     b1=0.9, b2=0.999, eps=0.0, weight_decay=0.0)
      >>> round(float(new), 6)
      0.5

    References:
      Loshchilov and Hutter, "Decoupled weight decay regularization", 2019.
    """
    op = "adamw"
    param, grad, m, v = checks.require_floats(op, param=param, grad=grad, m=m, v=v)
    _check_shapes(op, param=param, grad=grad, m=m, v=v)
    checks.require_in_range(op, "learning_rate", learning_rate, 0, INFINITY)
    checks.require_in_range(op, "b1", b1, 0, 1)
    checks.require_in_range(op, "b2", b2, 0, 1)
    checks.require_in_range(op, "eps", eps, 0, INFINITY)
    checks.require_in_range(op, "weight_decay", weight_decay, 0, INFINITY)
    wide = _wide_dtype(param, grad, m, v)
    count = _require_scalar(op, "step", step, wide) + 1
    return registry.run_op(
        op,
        ADAMW,
        *varying.match_varying(
            *(param, grad, m, v),
            _require_scalar(op, "learning_rate", learning_rate, wide),
            _require_scalar(op, "grad_scale", grad_scale, wide),
            equations.bias_correction(b1, count),
            equations.bias_correction(b2, count),
        ),
        implementation=implementation,
        config=config,
        dtypes=_result_dtypes(op, cast, param, m, v),
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
    )


def _wide_dtype(*arrays: jax.Array) -> jnp.dtype:
    return checks.accumulator(checks.common_dtype(*(array.dtype for array in arrays)))


def _require_scalar(op: str, option: str, value: ArrayLike, dtype: jnp.dtype) -> jax.Array:
    if jnp.ndim(value):
        raise ValueError(
            f"{op}: {option} needs to be a scalar, got shape {jnp.shape(value)}: use jax.vmap for "
            "several at once"
        )
    return jnp.asarray(value, dtype)


def _result_dtypes(op: str, cast: DTypeLike | None, *arrays: jax.Array) -> tuple[str, ...]:
    dtypes = tuple(str(array.dtype) for array in arrays)
    if cast is None:
        return dtypes
    if not jnp.issubdtype(cast, jnp.floating):
        raise TypeError(
            f"{op}: cast needs a floating-point dtype or None, got {jnp.dtype(cast)}: "
            "name the dtype of the next forward pass, such as jnp.bfloat16"
        )
    return (*dtypes, str(jnp.dtype(cast)))


def _check_shapes(op: str, **arrays: Any) -> None:
    if len({array.shape for array in arrays.values()}) > 1:
        given = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(
            f"{op}: {', '.join(arrays)} need one shape, got {given}: "
            "pass the state that belongs to this parameter"
        )
