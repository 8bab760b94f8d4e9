"""The newest state that can be used, on the exception that leaves `fit`."""

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

    Where the exception has an attribute of this name already it is `error.train_state`, and a note
    says so. A class that refuses attributes does not refuse these.

    Args:
      error: the exception.
      state: what the last step returned; None is given where it cannot be used any more.
      saved: which checkpoint is the newest, if some are made.
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
    """Tell whether a state's arrays are there, and the steps that made them succeeded; waits."""
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
