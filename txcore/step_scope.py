"""What a step knows while it is traced."""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from txcore.layout import axes_of


@dataclass(frozen=True)
class StepScope:
    """Hold what the engine knows of the step that is being traced.

    The engine leaves axes of size 1 out of every spec, so nothing varies along them and no
    collective over them is in the program.

    Attributes:
      data_axes: over which the batch is sharded, of more than one device each.
      row_axes: those of them over which its rows are: all but the plan's context axis.
      left_out: the mesh axes of size 1.
      examples: of the batch, on this device.
      scales_loss: whether the step computes in float16, so that its loss needs a scale.
      layouts: pytree of `Layout` like the parameters.
      shapes: of each parameter as this device computes with it, in the order of the leaves.
      gradient_shapes: of each gradient as it arrives at the optimizer on this device.
      regathers: whether the backward pass gathers parameters again, and does not keep them.
      shards_gradients: whether those of a microbatch are reduced as they come, and kept in parts.
      views: what `state.params` has gathered: by its id, each array and what it was made of.
      sync_options: of `tx.sync_gradients`, as the plan has them.
      pipeline: the plan's `PP`, for `tx.pipeline.value_and_grad`; None without one.
      rounds: how local SGD averages (`txcore.parallel.local_sgd.Rounds`): each device trains
        parameters of its own. None where gradients are reduced, and in an evaluation.
      doubts: what looks wrong by its type, and cannot be judged before the whole step is traced.
      weighed: what its means weigh by, each as an error says it ("tokens").
      activations: the type of what goes from stage to stage, of each of its pipelines.
    """

    data_axes: tuple[str, ...]
    row_axes: tuple[str, ...]
    left_out: frozenset[str]
    examples: int
    scales_loss: bool
    layouts: Any
    shapes: tuple[tuple[int, ...], ...]
    gradient_shapes: tuple[tuple[int, ...], ...]
    regathers: bool = True
    shards_gradients: bool = False
    views: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    sync_options: Mapping[str, Any] = field(default_factory=dict)
    pipeline: Any = None
    rounds: Any = None
    doubts: list[str] = field(default_factory=list)
    weighed: list[str] = field(default_factory=list)
    activations: list[Any] = field(default_factory=list)

    @property
    def own_axes(self) -> tuple[str, ...]:
        """The axes along which each device trains parameters of its own."""
        axes: tuple[str, ...] = () if self.rounds is None else self.rounds.axes
        return axes


_scope: contextvars.ContextVar[StepScope | None] = contextvars.ContextVar(
    "txcore_step", default=None
)


def current_scope() -> StepScope | None:
    """Return the scope of the step that is being traced, or None outside a step."""
    return _scope.get()


def left_out_axes() -> frozenset[str]:
    """Return the mesh axes that the engine leaves out of the step that is being traced."""
    scope = _scope.get()
    return scope.left_out if scope is not None else frozenset()


def specs_like(tree: Any) -> list[P] | None:
    """Return how each leaf of a tree like the parameters lies on the mesh; else None.

    It is like them if its leaves have the paths and shapes of parameters as this device computes
    with them, or of their gradients as they arrive at the optimizer, with or without more dims in
    front (gradients of each example). It may lack some of them, as that of a group of parameters
    does. Outside a step nothing is known.
    """
    scope = _scope.get()
    if scope is None:
        return None
    paths = jax.tree_util.tree_flatten_with_path(scope.layouts)[0]
    rows = zip(paths, scope.shapes, scope.gradient_shapes, strict=True)
    known = {path: (layout, *shapes) for (path, layout), *shapes in rows}
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if path not in known:
            return None
        layout, whole, part = known[path]
        shape = np.shape(leaf)
        if _ends_in(shape, part):
            found.append(layout.gradient)
        elif _ends_in(shape, whole):
            found.append(layout.view)
        else:
            return None
    return found


def split_axes_like(tree: Any) -> list[tuple[str, ...]] | None:
    """Return the axes over which each leaf is split, sorted, of a tree that `specs_like` knows."""
    specs = specs_like(tree)
    return None if specs is None else [tuple(sorted(axes_of(spec))) for spec in specs]


def _ends_in(shape: tuple[int, ...], tail: tuple[int, ...]) -> bool:
    return shape[len(shape) - len(tail) :] == tail


@contextlib.contextmanager
def tracing(scope: StepScope) -> Iterator[None]:
    """Make `scope` the current one for the duration of a step's trace."""
    token = _scope.set(scope)
    try:
        yield
    except Exception as error:
        for doubt in scope.doubts:  # which may be why
            error.add_note(f"txcore: before that, {doubt}")
        raise
    finally:
        _scope.reset(token)
