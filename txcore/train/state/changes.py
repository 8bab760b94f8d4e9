"""What `state.replace` may put in a field's place outside of a step."""

from typing import Any

import jax
import numpy as np

from txcore.kernels.common.checks import whole_number


def check_field(name: str, old: Any, new: Any) -> Any:
    """Return the new value of a state's field; refuse what the state could not train with.

    Args:
      name: the field's name.
      old: what it holds.
      new: what it is to hold: a whole number for `step` and `seed`, else a pytree.

    Raises:
      TypeError: a step or a seed is no whole number.
      ValueError: it does not fit the dtype, or parameters differ from the old ones in structure or
        shape.
    """
    if name in ("step", "seed") and not isinstance(new, jax.Array):
        return _as_scalar(name, old.dtype, new)
    if name == "stored_params":
        _check_same_shapes(old, new)
    return new


def _as_scalar(name: str, dtype: Any, value: Any) -> np.ndarray:
    number = whole_number(value)
    if number is None:
        raise TypeError(f"state.replace needs {name}= a whole number, got {value!r}")
    try:
        return np.asarray(number, dtype)
    except OverflowError as error:
        raise ValueError(f"state.replace needs another {name}=: {error}") from None


def _check_same_shapes(old: Any, new: Any) -> None:
    """Refuse parameters that do not fit the optimizer's state."""
    wanted, given = _shapes_of(old), _shapes_of(new)
    if wanted != given:
        wrong = next((pair for pair in given if pair not in wanted), None) or "a leaf less"
        raise ValueError(
            f"state.replace needs stored_params= with the leaves {wanted}, got {wrong}: make "
            "another state for other parameters (engine.create_state); lists are taken apart, so "
            "write numpy.asarray"
        )


def _shapes_of(tree: Any) -> list[tuple[str, tuple[int, ...]]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path), np.shape(leaf)) for path, leaf in leaves]
