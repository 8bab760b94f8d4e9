"""What the engine tells the collectives while it traces a step."""

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Scope:
    """The step that is being traced: its data axes, the mesh axes of size 1, its batch.

    `scales_loss` says whether it computes in float16, so that its loss needs a scale. `doubts`
    are what looks wrong by its type, and cannot be judged before the whole step is traced.

    The engine leaves axes of size 1 out of every spec, so nothing varies along them and no
    collective over them is in the program.
    """

    data_axes: tuple[str, ...]
    left_out: frozenset[str]
    examples: int  # on this device
    scales_loss: bool
    doubts: list[str] = field(default_factory=list)


_scope: contextvars.ContextVar[Scope | None] = contextvars.ContextVar("txcore_scope", default=None)


def current_scope() -> Scope | None:
    """Return the scope of the step that is being traced, or None outside a step."""
    return _scope.get()


def left_out_axes() -> frozenset[str]:
    """Return the mesh axes that the engine leaves out of the step that is being traced."""
    scope = _scope.get()
    return scope.left_out if scope is not None else frozenset()


@contextlib.contextmanager
def tracing(scope: Scope) -> Iterator[None]:
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
