"""Format txcore's objects for `repr`. Ground floor: imports nothing of txcore."""

import inspect
from typing import Any

import jax


def format_call(name: str, *given: Any, **options: tuple[Any, Any]) -> str:
    """Write the call that makes an object, without the options that have their defaults.

    Args:
      name: of the class or function.
      *given: what is always shown, without its name.
      **options: what was given, and the default with which it is left out.

    Returns:
      One line.

    Example:
      >>> format_call("sgd", 0.1, momentum=(0.9, 0.0), nesterov=(False, False))
      'sgd(0.1, momentum=0.9)'
    """
    shown = [_format_value(value) for value in given]
    for option, (value, usual) in options.items():
        if type(value) is not type(usual) or value != usual:
            shown.append(f"{option}={_format_value(value)}")
    return f"{name}({', '.join(shown)})"


def describe_tree(tree: Any) -> str:
    """Write how many leaves a tree of arrays has, and their bytes, without reading any.

    Example:
      >>> import numpy as np
      >>> describe_tree({"w": np.ones((3, 4), np.float32), "b": np.ones(4, np.float32)})
      '<2 arrays, 64 B>'
    """
    leaves = jax.tree.leaves(tree)
    number = f"{len(leaves)} array" + ("" if len(leaves) == 1 else "s")
    try:
        return f"<{number}, {sum(leaf.size * leaf.dtype.itemsize for leaf in leaves):,} B>"
    except AttributeError:  # jax also prints trees of shardings and of specs
        return f"<{len(leaves)} leaves>"


def describe_scalar(x: Any) -> str:
    """Write a scalar's value, or why there is none: it is traced, donated, or elsewhere."""
    if isinstance(x, jax.core.Tracer):
        return "<traced>"
    try:
        return str(x.item())
    except RuntimeError:
        return "<deleted>"
    except AttributeError:
        return repr(x)


def name_of(fn: Any) -> str:
    """Return what errors and profiles call a function; a functools.partial has no name.

    Example:
      >>> import functools
      >>> name_of(functools.partial(name_of, print))
      'name_of'
    """
    return getattr(fn, "__name__", None) or name_of(getattr(fn, "func", type(fn)))


def _format_value(value: Any) -> str:
    """Write a value in one line; a function by its name, where it has one of its own."""
    if inspect.isfunction(value):
        return "<function>" if "<" in value.__qualname__ else value.__name__
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_format_value, value))}]"
    if type(value).__repr__ is object.__repr__:
        return f"<{type(value).__name__}>"
    return " ".join(repr(value).split())
