"""The command line: `txcore inspect` and `txcore env`."""

import argparse
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:  # the real imports are in the commands: `txcore --help` must not wait for jax
    import jax

    from txcore.profiling import Report

_MOST_BYTES = 1 << 30
_OPTIONAL = (
    *("optax", "orbax-checkpoint", "tqdm", "matplotlib", "scikit-learn"),
    *("jax-triton", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"),
)


class _BadInput(Exception):
    """What was given cannot be used; its text is the one line that the user sees."""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise _BadInput(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: the arguments, by default the process's.

    Returns:
      The exit code: 0, or 1 where an inspected program has unexplained or missing collectives,
      or 2 for bad input, with one line on stderr.
    """
    try:
        options = _parser().parse_args(argv)
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except _BadInput as error:
        print(f"txcore: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="txcore", description="Explicit collectives for JAX, and their proof.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    look = commands.add_parser("inspect", help="list the collectives of a compiled program")
    look.add_argument(
        "target",
        nargs="?",
        metavar="MODULE:FACTORY",
        help="FACTORY() or, with --mesh, FACTORY(mesh) returns (fn, args); args may be shapes",
    )
    look.add_argument("--hlo", metavar="FILE", help="read this text of compiled HLO instead")
    look.add_argument("--mesh", type=_axes, metavar="data=2,model=2", help="the mesh's axes")
    look.add_argument("--devices", type=_positive, metavar="N", help="simulate N CPU devices")
    look.add_argument("--json", action="store_true", help="print the report as JSON")
    look.add_argument(
        "--max-bytes",
        type=_positive,
        metavar="N",
        help=f"refuse a longer --hlo file (default {_MOST_BYTES})",
    )
    look.set_defaults(command=_inspect)
    env = commands.add_parser("env", help="show versions, platform and devices")
    env.set_defaults(command=_env)
    return parser


def _axes(text: str) -> dict[str, int]:
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.strip().partition("=")
        if not (name.isidentifier() and equals and size.isdecimal() and int(size)) or name in axes:
            raise argparse.ArgumentTypeError(
                f"needs axes with sizes, each once, as data=2,model=2, but got {text!r}"
            )
        axes[name] = int(size)
    return axes


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"needs a number of at least 1, but got {text!r}")
    return int(text)


def _inspect(options: argparse.Namespace) -> int:
    if (options.target is None) == (options.hlo is None):
        raise _BadInput("inspect needs either MODULE:FACTORY or --hlo FILE")
    if options.hlo is not None and options.devices is not None:
        raise _BadInput("--devices is for MODULE:FACTORY: a file was compiled for its own devices")
    if options.hlo is None and options.max_bytes is not None:
        raise _BadInput("--max-bytes is for --hlo FILE, and there is none")
    report = _of_factory(options) if options.hlo is None else _of_file(options)
    print(report.to_json() if options.json else report)
    return 0 if report.ok else 1


def _of_file(options: argparse.Namespace) -> "Report":
    import jax

    from txcore.profiling import audit_text

    text = _read_text(options.hlo, options.max_bytes or _MOST_BYTES)
    axes = options.mesh
    mesh = jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes)) if axes else None
    try:
        return audit_text(text, mesh=mesh)
    except ValueError as error:
        raise _BadInput(f"{options.hlo}: {_first_line(error)}") from error


def _read_text(path: str, most_bytes: int) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(most_bytes + 1)
        if len(data) > most_bytes:
            raise _BadInput(f"{path} is longer than {most_bytes} bytes: raise --max-bytes")
        return data.decode()
    except UnicodeDecodeError:
        raise _BadInput(f"{path} is not text: give it HLO as text (xla_dump_hlo_as_text)") from None
    except OSError as error:
        raise _BadInput(f"cannot read {path}: {error.strerror or error}") from None


def _of_factory(options: argparse.Namespace) -> "Report":
    from txcore import _compat
    from txcore.profiling import audit

    if options.devices is not None:
        os.environ["JAX_PLATFORMS"] = "cpu"
        try:
            _compat.simulate_cpu_devices(options.devices)
        except RuntimeError as error:
            raise _BadInput(f"--devices {options.devices}: {_first_line(error)}") from error
    factory = _load(options.target)
    mesh = _mesh(options.mesh) if options.mesh else None
    fn, args = _build(factory, options.target, mesh)
    try:
        return audit(fn, *args)
    except Exception as error:
        raise _BadInput(
            f"{options.target}: the function does not compile: {_first_line(error)}"
        ) from error


def _load(target: str) -> Callable[..., Any]:
    module, colon, name = target.partition(":")
    if not (module and colon and name):
        raise _BadInput(f"inspect needs MODULE:FACTORY, but got {target!r}")
    sys.path.insert(0, os.getcwd())  # as `python -m` does; a console script does not
    try:
        factory = importlib.import_module(module)
        for part in name.split("."):
            factory = getattr(factory, part)
    except AttributeError:
        raise _BadInput(f"module {module} has no {name}") from None
    except (Exception, SystemExit) as error:
        raise _BadInput(f"cannot import {module}: {_first_line(error)}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(factory):
        raise _BadInput(f"{target} must be a function that returns (fn, args), and is none")
    return factory


def _mesh(axes: dict[str, int]) -> "jax.sharding.Mesh":
    import jax
    import numpy as np

    needed, devices = math.prod(axes.values()), jax.devices()
    if needed > len(devices):
        shape = ",".join(f"{name}={size}" for name, size in axes.items())
        raise _BadInput(
            f"the mesh {shape} needs {needed} devices, but there are {len(devices)}: "
            f"give --devices {needed} to simulate them on the CPU"
        )
    grid = np.array(devices[:needed]).reshape(tuple(axes.values()))
    types = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.sharding.Mesh(grid, tuple(axes), axis_types=types)


def _build(
    factory: Callable[..., Any], target: str, mesh: "jax.sharding.Mesh | None"
) -> tuple[Callable[..., Any], Sequence[Any]]:
    given = () if mesh is None else (mesh,)
    try:
        inspect.signature(factory).bind(*given)
    except TypeError:
        wanted = "give --mesh" if mesh is None else "leave out --mesh"
        raise _BadInput(f"{target} does not take {len(given)} arguments: {wanted}") from None
    try:
        built = factory(*given)
    except (Exception, SystemExit) as error:
        raise _BadInput(f"{target} failed: {_first_line(error)}") from error
    is_pair = isinstance(built, tuple) and len(built) == 2
    if not (is_pair and callable(built[0]) and isinstance(built[1], tuple | list)):
        raise _BadInput(f"{target} must return (fn, args), args a tuple, but got {_kind(built)}")
    return built[0], built[1]


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(part).__name__ for part in value)})"
    return type(value).__name__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _env(options: argparse.Namespace) -> int:
    import platform

    from tabulate import tabulate

    rows = [("python", platform.python_version()), ("platform", platform.platform())]
    rows += [(name, _version(name)) for name in ("txcore", "jax", "jaxlib", "numpy", *_OPTIONAL)]
    print(tabulate([*rows, *_devices()], tablefmt="plain"))
    return 0


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def _devices() -> list[tuple[str, str]]:
    from collections import Counter

    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        return [("devices", f"none: {_first_line(error)}")]
    kinds = Counter(device.device_kind for device in devices)
    text = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return [("backend", jax.default_backend()), ("devices", text)]


if __name__ == "__main__":
    sys.exit(main())
