"""Stochastic gradient descent."""

from functools import partial

import jax
from jax.typing import ArrayLike

from txcore import kernels
from txcore.kernels.common import checks
from txcore.optim import clipping, optimizer, rules
from txcore.optim.schedules import Schedule, as_schedule
from txcore.printing import format_call
from txcore.trees import Grads, OptState, Params


def sgd(
    learning_rate: float | Schedule,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decay_mask: rules.Mask | None = None,
    clip_norm: float | None = None,
) -> optimizer.Optimizer:
    """Make stochastic gradient descent, with momentum where it is not 0.

    The equations are those of `txcore.kernels.sgd_momentum`; the gradients are clipped first,
    in the same pass.

    Args:
      learning_rate: at least 0, or a schedule: step -> float32 scalar.
      momentum: in [0, 1); 0 keeps no velocity.
      nesterov: whether to look ahead along the velocity; needs a momentum.
      weight_decay: L2 coefficient added to the gradient, at least 0.
      decay_mask: the parameters that decay: path rules ("*/w", or several), a tree of bools like
        the parameters, or a function of the parameters that returns one; None takes all.
      clip_norm: the largest global norm of the gradients, above 0, after `grad_scale` if the
        update is given one; None does not clip.

    Returns:
      The optimizer. Its state is {} or {"velocity": ...}, float32 or wider.

    Raises:
      TypeError: `learning_rate` is neither a number nor a schedule.
      ValueError: a number is out of its range.

    Example:
      >>> import txcore as tx
      >>> optimizer = tx.optim.sgd(0.02, momentum=0.9)

    References:
      Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013.
    """
    rate = as_schedule("sgd", "learning_rate", learning_rate)
    checks.require_in_range("sgd", "momentum", momentum, 0, 1)
    checks.require_in_range("sgd", "weight_decay", weight_decay, 0, float("inf"))
    clipping.check_max_norm("sgd", "clip_norm", clip_norm)
    if nesterov and not momentum:
        raise ValueError("sgd: nesterov=True needs a momentum above 0, got 0: pass momentum=0.9")

    rules.check_decay("sgd", decay_mask, weight_decay)

    def init(params: Params) -> OptState:
        rules.mask_leaves("sgd", "decay_mask", decay_mask, params)  # refused now, if at all
        velocity = optimizer.zero_moments("sgd", params)
        return {"velocity": velocity} if momentum else {}

    def update(
        grads: Grads,
        opt_state: OptState,
        params: Params,
        *,
        step: jax.Array,
        grad_scale: ArrayLike = 1.0,
    ) -> tuple[Params, OptState]:
        leaf_update = partial(
            kernels.sgd_momentum,
            learning_rate=rate(step),
            momentum=momentum,
            nesterov=nesterov,
            grad_scale=clipping.clipping_scale("sgd", grads, clip_norm, grad_scale),
        )
        # Without momentum the velocity is zero before every update, and none is kept.
        velocity = opt_state["velocity"] if momentum else optimizer.zero_moments("sgd", params)
        decays = rules.mask_leaves("sgd", "decay_mask", decay_mask, params)
        updates = [partial(leaf_update, weight_decay=weight_decay if d else 0.0) for d in decays]
        params, velocity = optimizer.update_leaves("sgd", updates, params, grads, velocity)
        return params, {"velocity": velocity} if momentum else {}

    text = format_call(
        "sgd",
        learning_rate,
        momentum=(momentum, 0.0),
        nesterov=(nesterov, False),
        weight_decay=(weight_decay, 0.0),
        decay_mask=(decay_mask, None),
        clip_norm=(clip_norm, None),
    )
    clips = clip_norm is not None
    return optimizer.Optimizer(init, update, handles_shards=True, clips=clips, text=text)
