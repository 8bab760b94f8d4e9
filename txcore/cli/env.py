"""`txcore env`: show versions, platform and devices, and which kernels run on them."""

import argparse
from typing import Any

from txcore.cli.output import show


def add_command(commands: Any) -> None:
    """Add the command to the parser's subparsers."""
    parser = commands.add_parser("env", help="show versions, devices and kernels")
    parser.set_defaults(command=print_environment)


def print_environment(options: argparse.Namespace) -> int:
    """Print versions, platform, devices, XLA's options and the choice of kernels; return 0."""
    from tabulate import tabulate

    from txcore.doctor import facts

    devices = facts.list_devices()
    show(tabulate([*facts.list_versions(), *devices], tablefmt="plain"))
    if any(name == "backend" for name, _ in devices):
        show(f"\nXLA options of a step\n{tabulate(facts.list_options(), tablefmt='plain')}")
        show(f"\nkernels for float32, and why\n{tabulate(facts.list_kernels(), tablefmt='plain')}")
    return 0
