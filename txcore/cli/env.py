"""`txcore env`: versions, platform and devices."""

import argparse
from typing import Any

from txcore.cli.load import first_line

_OPTIONAL = (
    *("optax", "orbax-checkpoint", "tqdm", "matplotlib", "scikit-learn"),
    *("jax-triton", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"),
)


def add(commands: Any) -> None:
    """Add the command to the parser's subparsers."""
    parser = commands.add_parser("env", help="show versions, platform and devices")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print versions, platform and devices; return 0."""
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
        return [("devices", f"none: {first_line(error)}")]
    kinds = Counter(device.device_kind for device in devices)
    text = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return [("backend", jax.default_backend()), ("devices", text)]
