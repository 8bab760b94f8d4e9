"""Attach the newest usable state to the exception that leaves `fit`."""

import inspect
from typing import Any

import jax

from txcore.train.state.state import TrainState

_NONE_LEFT = (
    "txcore: error.state is None: the step that failed or was cut short had been given the state, "
    "and a step uses up what it is given"
)
_TAKEN = "txcore: this exception has a state of its own; the train state is error.train_state"


def give_state(error: BaseException, state: Any, saved: str | None) -> None:
    """Give an exception the newest state, as `error.state`.

    If the exception already has a `state`, the attribute is `error.train_state`, and a note says
    so. Exceptions of a frozen dataclass get it as well.

    Args:
      error: the exception.
      state: what the last step returned; the exception gets None if its arrays are gone.
      saved: a sentence about the newest checkpoint; "" if the run makes none.
    """
    if not isinstance(state, TrainState):
        return
    own = inspect.getattr_static(error, "state", None)
    taken = own is not None and not isinstance(own, TrainState)
    alive = is_alive(state)
    _set_state(error, "train_state" if taken else "state", state if alive else None)
    if taken:
        _add_note(error, _TAKEN)
    if not alive:
        _add_note(error, f"{_NONE_LEFT}. {saved}" if saved else _NONE_LEFT)


def is_alive(state: TrainState) -> bool:
    """Wait for a state's arrays; tell whether they exist and were computed without an error."""
    arrays = jax.tree.leaves(state.arrays)
    if any(x.is_deleted() for x in arrays):
        return False
    try:
        jax.block_until_ready(arrays)
    except Exception:  # whatever the runtime says of a step that failed
        return False
    return True


def _set_state(error: BaseException, name: str, value: Any) -> None:
    BaseException.__setattr__(error, name, value)  # a frozen dataclass refuses its own


def _add_note(error: BaseException, text: str) -> None:
    if text not in (notes := list(getattr(error, "__notes__", ()))):
        _set_state(error, "__notes__", [*notes, text])
