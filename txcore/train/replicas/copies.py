"""Copy a user's parameters to the host; refuse models that hold more than arrays."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from txcore import _compat

_EQUINOX = (
    "an equinox module holds more than arrays. Write params, static = eqx.partition(model, "
    "eqx.is_inexact_array), pass params, and in the step model = eqx.combine(params, static) (of "
    "what is left, arrays that are not trained go to extra=)"
)
_NNX = (
    "an nnx module holds more than parameters. Write graph, params, rest = nnx.split(model, "
    "nnx.Param, ...), pass params and extra=rest, and in the step model = nnx.merge(graph, "
    "state.params, state.extra)"
)
_LINEN = (
    "a linen module holds no arrays. Pass model.init(key, x)['params'], and in the step call "
    "model.apply({'params': state.params}, x)"
)


def copy_to_host(tree: Any, what: str, *, user: str = "create_state", trained: bool = False) -> Any:
    """Return a pytree with every array copied to the host; typed PRNG keys stay as they are.

    Args:
      tree: pytree of arrays and numbers.
      what: the name of the tree in errors ("params").
      user: the function that was called with it, for errors.
      trained: whether it is differentiated; then it may hold no keys.

    Raises:
      TypeError: a leaf is not an array, or lies in a model that has to be split first.
    """
    modules = list(_find_models(tree, what))
    if trained:
        _check_variables(tree, what, user)

    def copy_leaf(path: Any, leaf: Any) -> Any:
        where = f"{what}{jax.tree_util.keystr(path)}"
        inside = [remedy for start, remedy in modules if where.startswith(start)]
        if problem := _describe_problem(leaf, bool(inside), trained):
            raise TypeError(f"{user} needs {problem} at {where}: {_choose_remedy(leaf, inside)}")
        if _compat.is_key_array(leaf):
            return leaf
        given = in_native_order(np.asarray(leaf))
        return np.array(given, dtype=jax.dtypes.canonicalize_dtype(given.dtype))

    return jax.tree_util.tree_map_with_path(copy_leaf, tree)


def _describe_problem(leaf: Any, in_module: bool, trained: bool) -> str | None:
    """Describe what a leaf needs to be and what it is; None for an array."""
    if isinstance(leaf, jax.core.Tracer):
        return f"arrays, got {type(leaf).__name__}, which stands for one while jax traces,"
    if _compat.is_key_array(leaf):
        return "arrays to train, got PRNG keys" if trained else None
    numbers: tuple[type, ...] = (jax.Array, np.ndarray, np.generic)
    if not in_module:  # a module's numbers are its options
        numbers += (int, float)
    if not isinstance(leaf, numbers):
        return f"arrays, got {type(leaf).__name__}"
    if not isinstance(leaf, jax.Array) and not _is_numeric(np.asarray(leaf).dtype):
        return f"arrays of numbers, got {np.asarray(leaf).dtype}"
    return None


def in_native_order(array: np.ndarray) -> np.ndarray:
    """Return an array in this machine's byte order, the only one that jax takes (not ">f4")."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _is_numeric(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.bool_)


def _choose_remedy(leaf: Any, inside: list[str]) -> str:
    if isinstance(leaf, jax.core.Tracer):
        return "call it outside of jax.jit, vmap, grad and scan"
    if own := _remedy_of(leaf):
        return own
    if inside:
        return inside[-1]
    if _compat.is_key_array(leaf):
        return "pass them in extra="
    if isinstance(leaf, (np.ndarray, np.generic)):
        return "encode it as numbers"
    return "convert it with numpy.asarray"


def _find_models(tree: Any, what: str) -> Iterator[tuple[str, str]]:
    """Yield the path of each model in a pytree, and what to do if it holds more than arrays."""
    nodes = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: _remedy_of(x) is not None)
    for path, node in nodes[0]:
        if remedy := _remedy_of(node):
            yield f"{what}{jax.tree_util.keystr(path)}", remedy


def _check_variables(tree: Any, what: str, user: str) -> None:
    """Refuse to train nnx variables that are not Params: weight decay would change them."""
    nodes = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: bool(_variable_of(x)))
    for path, node in nodes[0]:
        kinds = _variable_of(node)
        if kinds and "Param" not in kinds:
            raise TypeError(
                f"{user} needs arrays to train, got nnx.{kinds[0]} at "
                f"{what}{jax.tree_util.keystr(path)}: {_NNX}"
            )


def _variable_of(x: Any) -> list[str]:
    """Return the names of an nnx Variable's classes, its own first; none for other values."""
    names = [base.__name__ for base in type(x).__mro__]
    nnx = any(base.__module__.startswith("flax.nnx.") for base in type(x).__mro__)
    return names if nnx and "Variable" in names else []


def _remedy_of(x: Any) -> str | None:
    """Return what to do with a model of another library, without importing the library."""
    for base in type(x).__mro__:
        library, name = base.__module__, base.__name__
        if library.startswith("equinox.") and name == "Module":
            return _EQUINOX
        if library.startswith("flax.nnx.") and name == "Module":
            return _NNX
        if library.startswith("flax.linen.") and name == "Module":
            return _LINEN
    return None
