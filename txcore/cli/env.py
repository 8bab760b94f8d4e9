"""`txcore env`: show versions, platform and devices, and which kernels run on them."""

import argparse
from typing import Any

from txcore.cli.errors import first_line
from txcore.cli.output import show

_OPTIONAL = (
    *("optax", "orbax-checkpoint", "tqdm", "matplotlib", "scikit-learn"),
    *("jax-triton", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"),
)


def add_command(commands: Any) -> None:
    """Add the command to the parser's subparsers."""
    parser = commands.add_parser("env", help="show versions, devices and kernels")
    parser.set_defaults(command=print_environment)


def print_environment(options: argparse.Namespace) -> int:
    """Print versions, platform, devices and the choice of kernels; return 0."""
    import platform

    from tabulate import tabulate

    rows = [("python", platform.python_version()), ("platform", platform.platform())]
    rows += [
        (name, _find_version(name)) for name in ("txcore", "jax", "jaxlib", "numpy", *_OPTIONAL)
    ]
    devices = _list_devices()
    show(tabulate([*rows, *devices], tablefmt="plain"))
    if any(name == "backend" for name, _ in devices):
        show(f"\nkernels for float32, and why\n{tabulate(_list_kernels(), tablefmt='plain')}")
    return 0


def _list_kernels() -> list[tuple[str, ...]]:
    """Return which kernels would run on the default device for the main named shapes."""
    from txcore.kernels.dispatch import registry
    from txcore.kernels.dispatch.tuned import cache_path, fields_of
    from txcore.kernels.dispatch.tuning_file import TuningError, label_candidate
    from txcore.kernels.tuning.measure import problem_of
    from txcore.kernels.tuning.shapes import MAIN, SHAPES

    rows: list[tuple[str, ...]] = [("tuning file", cache_path() or "none")]
    for name in MAIN:
        problem, kernels = problem_of(SHAPES[name], "float32")
        try:
            choice = registry.choose_implementation(problem, kernels, None)
        except TuningError as error:
            return [*rows, ("refused", first_line(error))]
        what = label_candidate(choice.implementation, fields_of(choice.config))
        rows.append((problem.op, name, what, choice.source))
    return rows


def _find_version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def _list_devices() -> list[tuple[str, str]]:
    from collections import Counter

    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        return [("devices", f"none: {first_line(error)}")]
    kinds = Counter(device.device_kind for device in devices)
    text = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return [("backend", jax.default_backend()), ("devices", text)]
