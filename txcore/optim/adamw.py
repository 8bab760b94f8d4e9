"""Adam with decoupled weight decay."""

from functools import partial

import jax
from jax.typing import ArrayLike

from txcore import kernels
from txcore.kernels.common import checks
from txcore.optim import clipping, optimizer, rules
from txcore.optim.schedules import Schedule, as_schedule
from txcore.printing import format_call
from txcore.trees import Grads, OptState, Params


def adamw(
    learning_rate: float | Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    decay_mask: rules.Mask | None = None,
    clip_norm: float | None = None,
) -> optimizer.Optimizer:
    """Make Adam with decoupled weight decay.

    The equations are those of `txcore.kernels.adamw`; the gradients are clipped first,
    in the same pass.

    Args:
      learning_rate: at least 0, or a schedule: step -> float32 scalar.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, at least 0.
      weight_decay: at least 0.
      decay_mask: the parameters that decay: path rules ("*/w", or several), a tree of bools like
        the parameters, or a function of the parameters that returns one; None takes all.
      clip_norm: the largest global norm of the gradients, above 0, after `grad_scale` if the
        update is given one; None does not clip.

    Returns:
      The optimizer. Its state is {"m": ..., "v": ...}, float32 or wider.

    Raises:
      TypeError: `learning_rate` is neither a number nor a schedule.
      ValueError: a number is out of its range.

    Example:
      >>> import txcore as tx
      >>> optimizer = tx.optim.adamw(tx.optim.cosine(1e-3, total_steps=1000, warmup_steps=50))

    References:
      Loshchilov and Hutter, "Decoupled weight decay regularization", 2019.
    """
    rate = as_schedule("adamw", "learning_rate", learning_rate)
    checks.require_in_range("adamw", "b1", b1, 0, 1)
    checks.require_in_range("adamw", "b2", b2, 0, 1)
    checks.require_in_range("adamw", "eps", eps, 0, float("inf"))
    checks.require_in_range("adamw", "weight_decay", weight_decay, 0, float("inf"))
    clipping.check_max_norm("adamw", "clip_norm", clip_norm)

    rules.check_decay("adamw", decay_mask, weight_decay)

    def init(params: Params) -> OptState:
        rules.mask_leaves("adamw", "decay_mask", decay_mask, params)  # refused now, if at all
        # Twice, since a donated state may not hold one array under two names.
        return {name: optimizer.zero_moments("adamw", params) for name in ("m", "v")}

    def update(
        grads: Grads,
        opt_state: OptState,
        params: Params,
        *,
        step: jax.Array,
        grad_scale: ArrayLike = 1.0,
    ) -> tuple[Params, OptState]:
        leaf_update = partial(
            kernels.adamw,
            step=step,
            learning_rate=rate(step),
            b1=b1,
            b2=b2,
            eps=eps,
            grad_scale=clipping.clipping_scale("adamw", grads, clip_norm, grad_scale),
        )
        decays = rules.mask_leaves("adamw", "decay_mask", decay_mask, params)
        updates = [partial(leaf_update, weight_decay=weight_decay if d else 0.0) for d in decays]
        params, m, v = optimizer.update_leaves(
            "adamw", updates, params, grads, opt_state["m"], opt_state["v"]
        )
        return params, {"m": m, "v": v}

    text = format_call(
        "adamw",
        learning_rate,
        b1=(b1, 0.9),
        b2=(b2, 0.999),
        eps=(eps, 1e-8),
        weight_decay=(weight_decay, 0.01),
        decay_mask=(decay_mask, None),
        clip_norm=(clip_norm, None),
    )
    clips = clip_norm is not None
    return optimizer.Optimizer(init, update, handles_shards=True, clips=clips, text=text)
