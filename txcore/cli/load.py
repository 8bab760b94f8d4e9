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

    from txcore.profiling.program import Program


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


def add_program(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add MODULE:FACTORY to a command's parser, and the options that say where it runs."""
    parser.add_argument(
        "factory",
        nargs="?" if optional else None,
        metavar="MODULE:FACTORY",
        help="FACTORY() or, with --mesh, FACTORY(mesh) returns (fn, args); args may be shapes",
    )
    parser.add_argument("--mesh", type=axes, metavar="data=2,model=2", help="the mesh's axes")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--devices", type=positive, metavar="N", help="simulate N CPU devices")
    where.add_argument(
        "--target",
        metavar="T",
        help="compile for a machine that need not be here: tpu:v5p:16x16x16, cuda:h100:64x8 "
        "(hosts x GPUs)",
    )


def compile_factory(options: argparse.Namespace, *, keep_partitioned: bool = False) -> "Program":
    """Build and compile what `add_program` read.

    Raises:
      BadInput: something of it cannot be used, or the function does not compile.
    """
    from txcore.profiling.program import compile_for_target, compile_program

    simulate_devices(options.devices)
    factory = load(options.factory)
    if options.target is not None:
        mesh = _target_mesh(options.target, options.mesh)
    else:
        mesh = mesh_of(options.mesh) if options.mesh else None
    fn, args = build(factory, options.factory, mesh)
    try:
        if options.target is None:
            return compile_program(fn, args, keep_partitioned=keep_partitioned)
        return compile_for_target(
            lambda: (fn, args), options.target, None, keep_partitioned=keep_partitioned
        )
    except Exception as error:
        raise BadInput(
            f"{options.factory}: the function does not compile: {first_line(error)}"
        ) from error


def _target_mesh(target: str, sizes: dict[str, int] | None) -> "jax.sharding.Mesh | None":
    from txcore import _compat
    from txcore.profiling.targets import parse_target

    try:
        found = parse_target(target)
        if found.platform == "cpu" and not _compat.backend_started():
            simulate_devices(found.size)
        return found.mesh(sizes) if sizes else None
    except (ValueError, ImportError, RuntimeError) as error:
        raise BadInput(f"--target: {error}") from error


def simulate_devices(count: int | None) -> None:
    """Simulate `--devices` CPU devices; None leaves the platform as it is."""
    from txcore import _compat

    if count is None:
        return
    import jax

    try:
        _compat.simulate_cpu_devices(count)
    except RuntimeError as error:
        raise BadInput(f"--devices {count}: {first_line(error)}") from error
    jax.config.update("jax_platforms", "cpu")
    os.environ["JAX_PLATFORMS"] = "cpu"  # for processes that the factory starts


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
