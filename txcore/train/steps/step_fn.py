"""step_fn: a training step that runs on the engine that made its state."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from txcore import _compat
from txcore.printing import name_of
from txcore.train.state.state import TrainState


class StepFn:
    """A step `(state, batch) -> (state, metrics)`, written for one device's part of the batch."""

    def __init__(self, fn: Callable[[TrainState, Any], Any]) -> None:
        self.fn = fn
        functools.update_wrapper(self, fn)
        self.__name__ = name_of(fn)

    def __call__(self, state: TrainState, batch: Any) -> Any:
        """Run one step on the engine that made `state`; `state` is donated."""
        if not isinstance(state, TrainState):
            raise TypeError(
                f"{self.__name__} needs a state made by engine.create_state(params), got "
                f"{type(state).__name__}"
            )
        if state.owner.engine is None:
            refuse_tracing(self, state, batch)  # the likely reason
        return state.engine.run(self, state, batch)


def function_of(step: Any) -> Any:
    """Return the function of a step, whether it was marked by `step_fn` or not."""
    return step.fn if isinstance(step, StepFn) else step


def refuse_tracing(step: Any, state: Any, batch: Any) -> None:
    """Refuse to run a step on what jax traces instead of on arrays."""
    if not _compat.may_trace():
        return
    for leaf in jax.tree.leaves((state, batch)):
        if isinstance(leaf, jax.core.Tracer):
            given = type(leaf).__name__
            raise TypeError(
                f"{name_of(step)} needs arrays, got {given}: a step is compiled by its engine "
                "and cannot be called under jax.jit, vmap, grad or scan, nor inside a step. Call "
                "it in a Python loop (the devices are not waited for)"
            )


def check_jit(name: str) -> None:
    """Refuse to compile where jax is told not to."""
    if _compat.setting("jax_disable_jit"):
        raise RuntimeError(
            f"{name} needs to be compiled, and jax_disable_jit is set: unset it "
            "(JAX_DISABLE_JIT=0, or leave jax.disable_jit()). jax.debug.print and "
            "jax.debug.breakpoint show values inside a compiled step"
        )


def step_fn(fn: Callable[[TrainState, Any], Any]) -> StepFn:
    """Make a training step of a function, to be called with a state and a whole batch.

    The function itself is written for one device: it sees its part of the batch, and calls
    collectives over the plan's axes. It runs on the engine that made the state; the same
    step works on any engine.

    Args:
      fn: `fn(state, batch) -> (state, metrics)`; for `engine.evaluate`, `fn(state, batch) ->
        metrics`. `metrics` is a dict of arrays that no longer vary along any axis.

    Returns:
      A callable `(state, batch) -> (state, metrics)`.

    Raises:
      TypeError: `fn` is not callable.

    Example:
      >>> @tx.step_fn
      ... def train_step(state, batch):
      ...     loss, grads = tx.value_and_grad(lambda w: jax.numpy.mean(w * batch))(state.params)
      ...     grads, state = state.sync_gradients(grads)
      ...     return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}
      >>> engine = tx.Engine(mesh=tx.MeshSpec(jax.devices()[:2]), optimizer=tx.optim.sgd(0.5),
      ...                    plan=tx.Plan(data_parallel=tx.DP("data")))
      >>> state, metrics = train_step(engine.create_state(np.float32(1)), np.arange(4.0))
      >>> float(state.params), float(metrics["loss"])
      (0.25, 1.5)
    """
    if not callable(fn):
        raise TypeError(f"tx.step_fn needs a function (state, batch), got {fn!r}")
    return StepFn(fn)
