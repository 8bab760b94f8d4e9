"""`txcore inspect`: the collectives of a compiled program."""

import argparse
from typing import TYPE_CHECKING, Any

from txcore.cli.load import (
    BadInput,
    axes,
    build,
    first_line,
    load,
    mesh_of,
    positive,
    simulate_devices,
)

if TYPE_CHECKING:
    from txcore.profiling import Report

_MOST_BYTES = 1 << 30


def add(commands: Any) -> None:
    """Add the command to the parser's subparsers."""
    parser = commands.add_parser("inspect", help="list the collectives of a compiled program")
    parser.add_argument(
        "factory",
        nargs="?",
        metavar="MODULE:FACTORY",
        help="FACTORY() or, with --mesh, FACTORY(mesh) returns (fn, args); args may be shapes",
    )
    parser.add_argument("--hlo", metavar="FILE", help="read this text of compiled HLO instead")
    parser.add_argument("--mesh", type=axes, metavar="data=2,model=2", help="the mesh's axes")
    parser.add_argument("--devices", type=positive, metavar="N", help="simulate N CPU devices")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--max-bytes",
        type=positive,
        metavar="N",
        help=f"refuse a longer --hlo file (default {_MOST_BYTES})",
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print the report; return 1 where it is not ok."""
    if (options.factory is None) == (options.hlo is None):
        raise BadInput("inspect needs either MODULE:FACTORY or --hlo FILE")
    if options.hlo is not None and options.devices is not None:
        raise BadInput("--devices is for MODULE:FACTORY: a file was compiled for its own devices")
    if options.hlo is None and options.max_bytes is not None:
        raise BadInput("--max-bytes is for --hlo FILE, and there is none")
    report = _of_factory(options) if options.hlo is None else _of_file(options)
    print(report.to_json() if options.json else report)
    return 0 if report.ok else 1


def _of_file(options: argparse.Namespace) -> "Report":
    import jax

    from txcore.profiling import audit_text

    text = _read_text(options.hlo, options.max_bytes or _MOST_BYTES)
    sizes = options.mesh
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes)) if sizes else None
    try:
        return audit_text(text, mesh=mesh)
    except ValueError as error:
        raise BadInput(f"{options.hlo}: {first_line(error)}") from error


def _read_text(path: str, most_bytes: int) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(most_bytes + 1)
        if len(data) > most_bytes:
            raise BadInput(f"{path} is longer than {most_bytes} bytes: raise --max-bytes")
        return data.decode()
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not text: give it HLO as text (xla_dump_hlo_as_text)") from None
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None


def _of_factory(options: argparse.Namespace) -> "Report":
    from txcore.profiling import audit

    simulate_devices(options.devices)
    factory = load(options.factory)
    mesh = mesh_of(options.mesh) if options.mesh else None
    fn, args = build(factory, options.factory, mesh)
    try:
        return audit(fn, *args)
    except Exception as error:
        raise BadInput(
            f"{options.factory}: the function does not compile: {first_line(error)}"
        ) from error
