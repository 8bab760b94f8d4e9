"""Which implementation of an op runs."""

from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

Implementation = Literal["xla", "pallas", "triton"]
NAMES: tuple[Implementation, ...] = ("xla", "pallas", "triton")

Function = TypeVar("Function", bound=Callable[..., object])


def resolve(
    op: str, implementation: str | None, implementations: Mapping[Implementation, Function]
) -> Function:
    """Return the implementation of `op` that was asked for, never another one.

    Args:
      op: the op's public name, for the errors.
      implementation: one of `NAMES`, or None for "xla".
      implementations: the op's functions by name; every op has "xla".

    Returns:
      The function.

    Raises:
      ValueError: there is no implementation of that name for any op.
      NotImplementedError: this op has no implementation of that name.
    """
    name = "xla" if implementation is None else implementation
    if name not in NAMES:
        raise ValueError(
            f"{op}: implementation must be None or one of {', '.join(map(repr, NAMES))}; "
            f"got {implementation!r}. Leave it out to have one chosen."
        )
    if name not in implementations:
        raise NotImplementedError(
            f"{op}: implementation={name!r} was asked for, and {op} has no {name} kernel; "
            f"it has {', '.join(map(repr, implementations))}. "
            f"Pass one of those, or leave implementation out to have one chosen."
        )
    return implementations[name]
