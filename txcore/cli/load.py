"""Read the arguments of commands: axes, devices, MODULE:FACTORY; refuse bad input."""

import argparse
import contextlib
import importlib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from txcore.cli.errors import BadInput as BadInput
from txcore.cli.errors import BadUsage, blame_user_line, first_line

if TYPE_CHECKING:  # the real imports are in the functions: `txcore --help` must not wait for jax
    import jax

    from txcore.profiling.program import Program
    from txcore.profiling.targets import Target


_DIGITS = 18


def parse_axes(text: str) -> dict[str, int]:
    """Read "data=2,model=2", as the type of an option."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.strip().partition("=")
        is_size = size.isdecimal() and len(size) <= _DIGITS and int(size) > 0
        if not (name.isidentifier() and equals and is_size) or name in found:
            raise argparse.ArgumentTypeError(
                f"needs axes with sizes, each once, as data=2,model=2, but got {text[:80]!r}"
            )
        found[name] = int(size)
    return found


def parse_positive(text: str) -> int:
    """Read a number of at least 1, as the type of an option."""
    if text.isdecimal() and len(text) > _DIGITS:
        raise argparse.ArgumentTypeError(f"needs at most {_DIGITS} digits, but got {len(text)}")
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"needs a number of at least 1, but got {text[:80]!r}")
    return int(text)


def parse_devices(text: str) -> int:
    """Read a number of simulated devices, as the type of an option."""
    from txcore.profiling.targets.target import MOST_DEVICES

    if (number := parse_positive(text)) > MOST_DEVICES:
        raise argparse.ArgumentTypeError(f"needs at most {MOST_DEVICES} devices, but got {number}")
    return number


def parse_path(text: str) -> str:
    """Read a path, ~ expanded, as the type of an option: shells leave `--file=~/x` as it is."""
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise argparse.ArgumentTypeError(
            f"needs a path, but {text!r} begins with a user that is not known here: write it out"
        )
    return expanded


def parse_allowed(text: str) -> tuple[str, ...]:
    """Read "partitioner,boundary", as the type of an option."""
    from txcore.profiling.report.report import check_allowed

    try:
        return tuple(sorted(check_allowed(part.strip() for part in text.split(","))))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_program(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add MODULE:FACTORY to a command's parser, and the options that say where it runs."""
    parser.add_argument(
        "factory",
        nargs="?" if optional else None,
        metavar="MODULE:FACTORY",
        help="FACTORY() or, with --mesh, FACTORY(mesh) returns (fn, args); args may be shapes. "
        "FILE.py:FACTORY is read as well",
    )
    parser.add_argument(
        "--traceback", action="store_true", help="where that code fails, show all of its error"
    )
    parser.add_argument("--mesh", type=parse_axes, metavar="data=2,model=2", help="the mesh's axes")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--devices", type=parse_devices, metavar="N", help="simulate N CPU devices")
    where.add_argument(
        "--target",
        metavar="T",
        help="compile for a machine that need not be here: tpu:v5p:16x16x16, cuda:h100:64x8 "
        "(hosts x GPUs)",
    )


def compile_factory(options: argparse.Namespace, *, keep_partitioned: bool = False) -> "Program":
    """Build and compile the program of the options that `add_program` adds.

    Raises:
      BadInput: an option cannot be used, or the function does not compile.
    """
    from txcore.profiling.program import compile_for_target, compile_program

    # Before the module is imported: it may make arrays, after which the devices are fixed.
    simulate_devices(options.devices)
    target = None if options.target is None else _parse_target(options.target)
    with add_to_import_path(options.factory):
        factory = load_factory(options.factory)
        if target is not None:
            mesh = _target_mesh(target, options.mesh) if options.mesh else None
        else:
            mesh = mesh_of(options.mesh) if options.mesh else None
        fn, args = build_program(factory, options.factory, mesh)
        try:
            if options.target is None:
                return compile_program(fn, args, keep_partitioned=keep_partitioned)
            return compile_for_target(
                lambda: (fn, args), options.target, None, keep_partitioned=keep_partitioned
            )
        except (Exception, SystemExit) as error:
            raise BadInput(
                f"{options.factory}: the function does not compile: {blame_user_line(error)}"
            ) from error


def _parse_target(target: str) -> "Target":
    """Read `--target`, and simulate its devices if they are CPUs."""
    from txcore import _compat
    from txcore.profiling.targets import parse_target

    try:
        found = parse_target(target)
    except ValueError as error:
        raise BadInput(f"--target: {error}") from error
    if found.platform == "cpu" and not _compat.backend_started():
        simulate_devices(found.size)
    return found


def search_target(target: str) -> "Target":
    """Read the target of a search, which needs the peaks of a chip.

    Raises:
      BadInput: there is no such target, or none with known peaks.
    """
    found = _parse_target(target)
    if found.chip is None:
        raise BadInput(
            f"--target: a search needs a chip whose peaks are known, got {target!r}: give a TPU or "
            "GPU target, as cuda:h100:8x8"
        )
    return found


def _target_mesh(target: "Target", sizes: dict[str, int]) -> "jax.sharding.Mesh":
    try:
        return target.mesh(sizes)
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


def split_factory(text: str) -> tuple[str, str]:
    """Return the parts before and after the colon of MODULE:FACTORY or FILE.py:FACTORY.

    Raises:
      BadUsage: the text is neither.

    Example:
      >>> from txcore.cli.load import split_factory
      >>> split_factory("examples/step.py:build")
      ('examples/step.py', 'build')
    """
    module, _, name = text.rpartition(":")
    is_file = module.endswith(".py")
    if not (module and name) or (not is_file and os.sep in module):
        raise BadUsage(f"needs MODULE:FACTORY or FILE.py:FACTORY, but got {text!r}")
    return parse_path(module) if is_file else module, name


@contextlib.contextmanager
def add_to_import_path(factory: str) -> Iterator[None]:
    """Put the file's folder, or the working folder, on the import path of the user's modules.

    `python FILE.py` and `python -m MODULE` do so; a console script does not. It stays there while
    the function is traced, which may import modules too.
    """
    module, _ = split_factory(factory)
    folder = os.path.dirname(os.path.abspath(module)) if module.endswith(".py") else os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have removed it
            sys.path.remove(folder)


def load_factory(factory: str) -> Callable[..., Any]:
    """Import MODULE:FACTORY or FILE.py:FACTORY."""
    module, name = split_factory(factory)
    try:
        imported = (
            _import_file(module) if module.endswith(".py") else importlib.import_module(module)
        )
    except BadInput:
        raise
    except (Exception, SystemExit) as error:
        raise BadInput(f"cannot import {module}: {blame_user_line(error)}") from error
    found: Any = imported
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise BadInput(f"{_name_source(module)} has no {name}") from None
    if not callable(found):
        raise BadInput(
            f"{factory} needs to be a function that returns (fn, args), got {_describe_kind(found)}"
        )
    return found


def _name_source(module: str) -> str:
    return f"file {module}" if module.endswith(".py") else f"module {module}"


def _import_file(file: str) -> ModuleType:
    """Import a file under its own name, or under another one if a module has that name."""
    if not os.path.isfile(file):
        raise BadInput(f"there is no file {file}")
    full, name = os.path.realpath(file), os.path.splitext(os.path.basename(file))[0]
    there = sys.modules.get(name)
    if there is not None:
        if os.path.realpath(getattr(there, "__file__", None) or "") == full:
            return there
        name = f"{name} of {full}"
    spec = importlib.util.spec_from_file_location(name, full)
    assert spec is not None
    assert spec.loader is not None  # a name that ends in .py always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and the file's own imports look it up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


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


def build_program(
    factory: Callable[..., Any], name: str, mesh: "jax.sharding.Mesh | None"
) -> tuple[Callable[..., Any], Sequence[Any]]:
    """Call the factory, named `name` in errors; return its (fn, args)."""
    given = () if mesh is None else (mesh,)
    try:
        inspect.signature(factory).bind(*given)
    except TypeError:
        wanted = "give --mesh" if mesh is None else "leave out --mesh"
        raise BadInput(f"{name} does not take {len(given)} arguments: {wanted}") from None
    try:
        built = factory(*given)
    except (Exception, SystemExit) as error:
        raise BadInput(f"{name} failed: {blame_user_line(error)}") from error
    is_pair = isinstance(built, tuple) and len(built) == 2
    if not (is_pair and callable(built[0]) and isinstance(built[1], tuple | list)):
        raise BadInput(
            f"{name} needs to return (fn, args), args a tuple, got {_describe_kind(built)}"
        )
    return built[0], built[1]


def _describe_kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(part).__name__ for part in value)})"
    return type(value).__name__
