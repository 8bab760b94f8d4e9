"""`txcore inspect`: list the collectives of a compiled program."""

import argparse
import errno
import os
import sys
from typing import TYPE_CHECKING, Any

from txcore.cli.errors import BadInput, BadUsage, first_line
from txcore.cli.load import (
    add_program,
    compile_factory,
    parse_allowed,
    parse_path,
    parse_positive,
)
from txcore.cli.output import show
from txcore.outside import read_regular

if TYPE_CHECKING:
    from txcore.profiling import Report

_MOST_BYTES = 1 << 28


def add_command(commands: Any) -> None:
    """Add the command to the parser's subparsers."""
    parser = commands.add_parser(
        "inspect",
        help="list the collectives of a compiled program, or of all that a script compiles",
        usage="txcore inspect [options] MODULE:FACTORY | --hlo FILE | "
        "-- python SCRIPT.py ARGS... (or -m MODULE, pytest, ...)",
    )
    add_program(parser, optional=True)
    parser.add_argument(
        "--hlo",
        type=parse_path,
        metavar="FILE",
        help="read this text of compiled HLO (- for stdin)",
    )
    parser.add_argument(
        "--after-spmd",
        action="store_true",
        help="list them as they are right after partitioning, each by itself",
    )
    parser.add_argument(
        "--against",
        type=parse_path,
        metavar="FILE",
        help="show what changed since this text of compiled HLO (- for stdin)",
    )
    parser.add_argument(
        "--html",
        type=parse_path,
        metavar="FILE",
        help="write the report as a page, too; of a command, a folder for the pages",
    )
    parser.add_argument(
        "--allow",
        type=parse_allowed,
        default=(),
        metavar="ORIGINS",
        help="let through what nobody asked for, of partitioner, boundary, unknown",
    )
    parser.add_argument(
        "--first",
        type=parse_positive,
        metavar="N",
        help="end the command once it has compiled N programs with a collective",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--max-bytes",
        type=parse_positive,
        metavar="N",
        help=f"refuse a longer file (default {_MOST_BYTES})",
    )
    parser.set_defaults(command=inspect_program)


def inspect_program(options: argparse.Namespace) -> int:
    """Print the report; return 1 where it is not ok."""
    if options.program is not None:
        from txcore.cli.script import inspect_script

        return inspect_script(options)
    _check_options(options)
    report = _audit_factory(options) if options.hlo is None else _audit_file(options, options.hlo)
    report = report.allowing(options.allow)
    earlier = None if options.against is None else _audit_file(options, options.against)
    if options.html is not None:
        _write_page(report, earlier, options.html)
    if earlier is not None:
        show(_describe_changes(earlier, report))
    show(report.to_json() if options.json else str(report))
    if not options.json and (reasons := report.why()):
        show(reasons)
    return 0 if report.ok else 1


def _describe_changes(earlier: "Report", report: "Report") -> str:
    from txcore.profiling.report.diff import diff, diff_text

    return f"since the earlier program:\n{diff_text(diff(earlier, report))}\n"


def _check_options(options: argparse.Namespace) -> None:
    if (options.factory is None) == (options.hlo is None):
        raise BadUsage("inspect needs either MODULE:FACTORY, --hlo FILE or -- COMMAND")
    if options.first is not None:
        raise BadUsage("--first is for a command after --: leave it out")
    for name in ("devices", "target") if options.hlo is not None else ():
        if getattr(options, name) is not None:
            raise BadUsage(
                f"--{name} is for MODULE:FACTORY: a file was compiled for its own devices"
            )
    if options.hlo is not None and options.after_spmd:
        raise BadUsage("--after-spmd is for MODULE:FACTORY: a file holds one stage of a program")
    if options.hlo is None and options.against is None and options.max_bytes is not None:
        raise BadUsage("--max-bytes is for --hlo FILE and --against FILE, and there is none")
    if options.hlo == options.against == "-":
        raise BadUsage("--hlo and --against cannot both be - (stdin): name a file for one of them")
    if options.json and options.against is not None:
        raise BadUsage("--against is for people: compare the reports of two --json runs instead")


def _write_page(report: "Report", earlier: "Report | None", file: str) -> None:
    try:
        report.to_html(file, earlier)
    except OSError as error:
        raise BadInput(f"cannot write {file}: {error.strerror or error}") from None


def _audit_file(options: argparse.Namespace, file: str) -> "Report":
    import jax

    from txcore.profiling import audit_text

    text = _read_text(file, options.max_bytes or _MOST_BYTES)
    sizes = options.mesh
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes)) if sizes else None
    try:
        return audit_text(text, mesh=mesh, max_bytes=options.max_bytes or _MOST_BYTES)
    except ValueError as error:
        raise BadInput(f"{file}: {first_line(error)}") from error


def _read_text(name: str, most_bytes: int) -> str:
    try:
        data = _read_stdin(most_bytes) if name == "-" else read_regular(name, most_bytes)
    except OSError as error:
        do = ": give a file, or - for stdin" if error.errno == errno.EINVAL else ""
        raise BadInput(f"cannot read {name}: {error.strerror or error}{do}") from None
    if data is None:
        raise BadInput(f"{name} is longer than {most_bytes} bytes: raise --max-bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise BadInput(f"{name} is not text: give it HLO as text (xla_dump_hlo_as_text)") from None


def _read_stdin(most_bytes: int) -> bytes | None:
    if sys.stdin is None:  # closed by the parent process
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    data = sys.stdin.buffer.read(most_bytes + 1)
    return data if len(data) <= most_bytes else None


def _audit_factory(options: argparse.Namespace) -> "Report":
    from txcore.profiling.audit import audit_program

    program = compile_factory(options, keep_partitioned=options.after_spmd)
    return audit_program(program, after_spmd=options.after_spmd)
