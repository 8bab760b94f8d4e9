"""The command line: each command is a module here, with `add(commands)` and its function."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from txcore.cli import costs, dump, env, inspect, launch, lock, tune
from txcore.cli.load import BadInput

_COMMANDS = (inspect, costs, dump, lock, tune, launch, env)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: the arguments, by default the process's.

    Returns:
      The exit code: 0, or 1 where a program fails what the command holds it to,
      or 2 for bad input, with one line on stderr, or 130 after Ctrl-C.
    """
    try:
        options = _parser().parse_args(argv)
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except BadInput as error:
        # A file's name or content may bring control characters into an error.
        from txcore.profiling.report.printable import printable

        print(f"txcore: error: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("txcore: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="txcore", description="Explicit collectives for JAX, and their proof.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return parser
