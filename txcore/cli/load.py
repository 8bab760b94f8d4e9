"""What commands read: axes, MODULE:FACTORY, devices; and how they refuse bad input."""

import argparse
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the real imports are in the functions: `txcore --help` must not wait for jax
    import jax


class BadInput(Exception):
    """What was given cannot be used; its text is the one line that the user sees."""


def axes(text: str) -> dict[str, int]:
    """Read "data=2,model=2", as the type of an option."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.strip().partition("=")
        if not (name.isidentifier() and equals and size.isdecimal() and int(size)) or name in found:
            raise argparse.ArgumentTypeError(
                f"needs axes with sizes, each once, as data=2,model=2, but got {text!r}"
            )
        found[name] = int(size)
    return found


def positive(text: str) -> int:
    """Read a number of at least 1, as the type of an option."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"needs a number of at least 1, but got {text!r}")
    return int(text)


def simulate_devices(count: int | None) -> None:
    """Simulate `--devices` CPU devices; None leaves the platform as it is."""
    from txcore import _compat

    if count is None:
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        _compat.simulate_cpu_devices(count)
    except RuntimeError as error:
        raise BadInput(f"--devices {count}: {first_line(error)}") from error


def load(factory: str) -> Callable[..., Any]:
    """Import MODULE:FACTORY, from the working folder too."""
    module, colon, name = factory.partition(":")
    if not (module and colon and name):
        raise BadInput(f"needs MODULE:FACTORY, but got {factory!r}")
    sys.path.insert(0, os.getcwd())  # as `python -m` does; a console script does not
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise BadInput(f"module {module} has no {name}") from None
    except (Exception, SystemExit) as error:
        raise BadInput(f"cannot import {module}: {first_line(error)}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise BadInput(f"{factory} must be a function that returns (fn, args), and is none")
    return found


def mesh_of(sizes: dict[str, int]) -> "jax.sharding.Mesh":
    """Return a mesh of this process's devices."""
    import jax
    import numpy as np

    needed, devices = math.prod(sizes.values()), jax.devices()
    if needed > len(devices):
        shape = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise BadInput(
            f"the mesh {shape} needs {needed} devices, but there are {len(devices)}: "
            f"give --devices {needed} to simulate them on the CPU"
        )
    grid = np.array(devices[:needed]).reshape(tuple(sizes.values()))
    types = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.sharding.Mesh(grid, tuple(sizes), axis_types=types)


def build(
    factory: Callable[..., Any], name: str, mesh: "jax.sharding.Mesh | None"
) -> tuple[Callable[..., Any], Sequence[Any]]:
    """Call the factory that the user calls `name`; return its (fn, args)."""
    given = () if mesh is None else (mesh,)
    try:
        inspect.signature(factory).bind(*given)
    except TypeError:
        wanted = "give --mesh" if mesh is None else "leave out --mesh"
        raise BadInput(f"{name} does not take {len(given)} arguments: {wanted}") from None
    try:
        built = factory(*given)
    except (Exception, SystemExit) as error:
        raise BadInput(f"{name} failed: {first_line(error)}") from error
    is_pair = isinstance(built, tuple) and len(built) == 2
    if not (is_pair and callable(built[0]) and isinstance(built[1], tuple | list)):
        raise BadInput(f"{name} must return (fn, args), args a tuple, but got {_kind(built)}")
    return built[0], built[1]


def first_line(error: BaseException) -> str:
    """Return an error's kind and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(part).__name__ for part in value)})"
    return type(value).__name__
