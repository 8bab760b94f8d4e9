"""`txcore costs`: show what a program sends, stores and computes, and its predicted time."""

import argparse
from typing import Any

from txcore.cli import search
from txcore.cli.errors import BadInput, first_line
from txcore.cli.load import add_program, compile_factory, parse_positive
from txcore.cli.output import show

_AT_LEAST = 1 << 20


def add_command(commands: Any) -> None:
    """Add the command to the parser's subparsers."""
    parser = commands.add_parser("costs", help="show a program's bytes, memory and predicted time")
    add_program(parser)
    parser.add_argument("--json", action="store_true", help="print the costs as JSON")
    parser.add_argument(
        "--at-least",
        type=parse_positive,
        metavar="BYTES",
        default=_AT_LEAST,
        help=f"leave out replicated arrays that would save less (default {_AT_LEAST})",
    )
    search.add_options(parser)
    parser.set_defaults(command=print_costs)


def print_costs(options: argparse.Namespace) -> int:
    """Print the costs; return 1 if the report of its collectives is not ok."""
    from txcore.profiling.costs import costs_of

    search.check_options(options)
    if options.search is not None:
        return search.print_search(options)
    program = compile_factory(options)
    try:
        found = costs_of(program, at_least=options.at_least)
    except ValueError as error:
        raise BadInput(f"{options.factory}: {first_line(error)}") from error
    show(found.to_json() if options.json else f"{found}\n\n{found.report.verdict()}")
    return 0 if found.report.ok else 1
