"""What `state.replace` may put in a field's place outside of a step."""

from typing import Any

import jax
import numpy as np

from txcore.kernels.common.checks import whole_number
from txcore.layout import same_structure

# The fields that fit the trained parameters, and what else to write where one does not.
_REMEDIES = {
    "stored_params": "make another state for other parameters (engine.create_state); lists are "
    "taken apart, so write numpy.asarray",
    "opt_state": "begin anew by opt_state=engine.optimizer.init(params), or make another engine "
    "for another optimizer",
    "loss_scaling": "it is that of the engine's precision and on_nonfinite=; write "
    "state.loss_scaling._replace(...) to change a number of it",
    "comm_state": "what communication keeps is that of the engine's plan; take it of a new state "
    "(engine.create_state(params).comm_state) to begin anew",
}


def check_field(name: str, old: Any, new: Any) -> Any:
    """Return the new value of a state's field; refuse what the state could not train with.

    Args:
      name: the field's name.
      old: what it holds.
      new: what it is to hold: a whole number for `step` and `seed`, else a pytree.

    Raises:
      TypeError: a step or a seed is no whole number.
      ValueError: it does not fit the dtype, or parameters, or what is kept for them, differ from
        the old ones in structure or shape.
    """
    if name in ("step", "seed") and not isinstance(new, jax.Array):
        return _as_scalar(name, old.dtype, new)
    if name in _REMEDIES:
        _check_fits(name, old, new)
    return new


def _as_scalar(name: str, dtype: Any, value: Any) -> np.ndarray:
    number = whole_number(value)
    if number is None:
        raise TypeError(f"state.replace needs {name}= a whole number, got {value!r}")
    try:
        return np.asarray(number, dtype)
    except OverflowError as error:
        raise ValueError(f"state.replace needs another {name}=: {error}") from None


def _check_fits(name: str, old: Any, new: Any) -> None:
    """Refuse what does not fit the other fields of a state."""
    wanted, given = _shapes_of(old), _shapes_of(new)
    if wanted != given or (name != "stored_params" and not same_structure(old, new)):
        wrong: Any = next((pair for pair in given if pair not in wanted), None)
        if wrong is None:
            wrong = "a leaf less" if len(given) < len(wanted) else "another structure"
        if new is None:
            wrong = "None"
        shown = f"with the leaves {wanted}" if wanted else f"as it is, {old!r}"
        raise ValueError(f"state.replace needs {name}= {shown}, got {wrong}: {_REMEDIES[name]}")


def _shapes_of(tree: Any) -> list[tuple[str, tuple[int, ...]]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path), np.shape(leaf)) for path, leaf in leaves]
