"""What a step knows while it is traced."""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from txcore.layout import Layout


@dataclass(frozen=True)
class StepScope:
    """Hold what the engine knows of the step that is being traced.

    The engine leaves axes of size 1 out of every spec, so nothing varies along them and no
    collective over them is in the program.

    Attributes:
      data_axes: over which the batch is sharded, of more than one device each.
      left_out: the mesh axes of size 1.
      examples: of the batch, on this device.
      scales_loss: whether the step computes in float16, so that its loss needs a scale.
      layouts: pytree of `Layout` like the parameters.
      shapes: of each parameter as this device stores it, in the order of the leaves.
      sync_options: of `tx.sync_gradients`, as the plan has them.
      doubts: what looks wrong by its type, and cannot be judged before the whole step is traced.
      weighed: what its means weigh by, each as an error says it ("tokens").
    """

    data_axes: tuple[str, ...]
    left_out: frozenset[str]
    examples: int
    scales_loss: bool
    layouts: Any
    shapes: tuple[tuple[int, ...], ...]
    sync_options: Mapping[str, Any] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    weighed: list[str] = field(default_factory=list)


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


def layouts_like(tree: Any) -> list[Layout] | None:
    """Return the layout of each leaf of a tree like the parameters, None for another tree.

    It is like them if its leaves have the paths and shapes of parameters as this device stores
    them, with or without more dims in front (gradients of each example). It may lack some of them,
    as that of a group of parameters does. Outside a step there are no layouts.
    """
    scope = _scope.get()
    if scope is None:
        return None
    paths = jax.tree_util.tree_flatten_with_path(scope.layouts)[0]
    rows = zip(paths, scope.shapes, strict=True)
    known = {path: (layout, shape) for (path, layout), shape in rows}
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        layout, stored = known.get(path, (None, ()))
        shape = np.shape(leaf)
        if layout is None or shape[len(shape) - len(stored) :] != stored:
            return None
        found.append(layout)
    return found


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
