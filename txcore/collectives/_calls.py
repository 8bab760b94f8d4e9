"""What a collective says to a call that is not its own, most of all to `jax.lax`'s spelling."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# jax.lax's options by what they are called here. Its `axis` is an array dim, ours a mesh axis.
_OURS = {
    "axis_name": "axis",
    "scatter_dimension": "dim",
    "split_axis": "split_dim",
    "concat_axis": "concat_dim",
    "source": "root",
}
_STACKING = {
    "all_gather": "jnp.expand_dims x at that dim first",
    "reduce_scatter": "jnp.squeeze the result's dim",
    "all_to_all": "jnp.expand_dims x at concat_dim first, and jnp.squeeze the result's split_dim",
}


def explain_calls(collective: Callable[P, R]) -> Callable[P, R]:
    """Decorate a collective so that a call that does not fit it raises what to write instead.

    The signature stays its own, for `help` and type checkers alike.

    Raises:
      TypeError: of the decorated function, with the literal call.
    """
    signature = inspect.signature(collective)

    @functools.wraps(collective)
    def call_checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(
                _explain_call(collective.__name__, signature, args, kwargs, error)
            ) from None
        has_dim_for_axis = type(given["axis"]) is int and "dim" in signature.parameters
        if isinstance(given.get("x"), str) or has_dim_for_axis:
            raise TypeError(_explain_call(collective.__name__, signature, args, kwargs, None))
        return collective(*args, **kwargs)

    return call_checked


def _explain_call(
    op: str,
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    error: TypeError | None,
) -> str:
    names = list(signature.parameters)
    meant, unknown = _translate_call(names, args, kwargs)
    takes = ", ".join([*names[:2], *(f"{name}=" for name in names[2:])])
    got = [
        *map(_show_argument, args),
        *(f"{name}={_show_argument(value)}" for name, value in kwargs.items()),
    ]
    reason = f" ({error})" if error else ""
    notes = _make_notes(op, {**kwargs, **unknown}, error)
    return (
        f"tx.{op} takes ({takes}), got tx.{op}({', '.join(got)}){reason}: write "
        f"{_write_call(op, signature, meant)}{notes}"
    )


def _translate_call(
    names: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a call means, by our names, and what there is no name for."""
    meant = dict(zip(names, args, strict=False))
    if isinstance(meant.get("x"), str) and not isinstance(meant.get("axis"), str):
        meant["x"], meant["axis"] = meant.get("axis"), meant["x"]
    unknown = {}
    in_order = sorted(kwargs.items(), key=lambda item: item[0] != "axis_name")
    for name, value in in_order:
        ours = _OURS.get(name, name)
        if ours == "axis" and type(value) is int:
            ours = "dim"
        if ours in names:
            meant[ours] = value
        elif name == "to" and value == "invarying" and "invariant" in names:
            meant["invariant"] = True
        else:
            unknown[name] = value
    if type(meant.get("axis")) is int:  # an array dim where the mesh axis belongs
        dim = meant.pop("axis")
        if "dim" in names:
            meant.setdefault("dim", dim)
    return meant, unknown


def _write_call(op: str, signature: inspect.Signature, meant: Mapping[str, Any]) -> str:
    """Write a call out; what it needs and was not given stands by its name."""
    parts = []
    for name, parameter in signature.parameters.items():
        is_needed = parameter.default is inspect.Parameter.empty
        if name in ("x", "axis"):
            parts.append(name if name == "x" or name not in meant else _show_argument(meant[name]))
        elif name in meant and meant[name] != parameter.default:
            parts.append(f"{name}={_show_argument(meant[name])}")
        elif is_needed:
            parts.append(f"{name}={'...' if name not in meant else _show_argument(meant[name])}")
    return f"tx.{op}({', '.join(parts)})"


def _show_argument(value: Any) -> str:
    """Write an argument as in a call: names and numbers as they are, arrays as x."""
    if isinstance(value, (str, bool, int, float, type(None))):
        return repr(value)
    return repr(value) if isinstance(value, (tuple, list)) and len(repr(value)) < 60 else "x"


def _make_notes(op: str, given: Mapping[str, Any], error: TypeError | None) -> str:
    notes = []
    of_lax = any(name in given for name in (*_OURS, "tiled", "to"))
    if op in _STACKING and error and of_lax and given.get("tiled") is not True:
        notes.append(f"it concatenates, as jax.lax does with tiled=True; to stack, {_STACKING[op]}")
    if given.get("axis_index_groups") is not None:
        notes.append("groups of devices are mesh axes: split that axis of the mesh in two")
    if given.get("to") in ("reduced", "unreduced"):
        notes.append(f"for to={given['to']!r} use jax.lax")
    return "".join(f"; {note}" for note in notes)
