"""The command line: each command is a module here, with `add_command` and its function.

Imports `_compat`, `bench`, `doctor`, `errors`, `kernels.dispatch`, `kernels.tuning`, `launch`,
`launch.join`, `launch.launcher`, `launch.watch`, `outside`, `profiling`, `profiling.audit`,
`profiling.cost`, `profiling.costs`, `profiling.lock`, `profiling.program`, `profiling.report`,
`profiling.targets`, `profiling.trace`, `profiling.trace.show`, `version`.
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from txcore.cli import bench, costs, doctor, dump, env, inspect, launch, lock, trace, tune
from txcore.cli.errors import BadInput, BadUsage
from txcore.cli.output import complain, show

_COMMANDS = (inspect, costs, dump, lock, trace, bench, tune, launch, doctor, env)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.set_defaults(parser=self)  # of the command, whose --help an error names

    def error(self, message: str) -> NoReturn:
        error = BadUsage(message)
        error.parser = self
        raise error


class _Version(argparse.Action):
    """Print the version; it is looked up then only, since `txcore launch` imports no jax."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from txcore.version import VERSION

        show(f"txcore {VERSION}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: the arguments, by default the process's.

    Returns:
      The exit code: 0, or 1 where a program fails what the command holds it to,
      or 2 for bad input, with one line on stderr (help, where nothing is given), or 130 after
      Ctrl-C.
    """
    given = sys.argv[1:] if argv is None else [*argv]
    options = argparse.Namespace()
    try:
        code = _run_command(given, options)
        show(end="")  # what argparse has printed, too
        return code
    except BadInput as error:
        _explain_error(error, given, options)
        return 2
    except KeyboardInterrupt:
        complain("txcore: interrupted")
        return 130
    except Exception:  # an error of our own must not pass for a proof that failed, which is 1
        complain(f"{traceback.format_exc()}txcore: error: this is a defect of txcore: report it")
        return 2


def _run_command(given: Sequence[str], options: argparse.Namespace) -> int:
    options.program = None
    if given[:1] == ["inspect"] and "--" in given:  # what follows is a command, with its options
        cut = given.index("--")
        given, options.program = given[:cut], given[cut + 1 :]
    try:
        _make_parser().parse_args(given, options)
    except SystemExit:  # after --help and --version
        return 0
    command: Callable[[argparse.Namespace], int] = options.command
    return command(options)


def _explain_error(error: BadInput, given: Sequence[str], options: argparse.Namespace) -> None:
    """Say in a line what was wrong; where nothing was given, what there is to give."""
    from txcore.outside import printable

    see = ""
    if isinstance(error, BadUsage):
        parser: argparse.ArgumentParser = error.parser or options.parser
        if parser.prog.split()[1:] == [*given]:
            complain(parser.format_help().rstrip())
            return
        see = f" (see {parser.prog} --help)"
    elif getattr(options, "traceback", False) and error.__cause__ is not None:
        complain("".join(traceback.format_exception(error.__cause__)).rstrip())
    # A file's name or content may bring control characters into an error.
    complain(f"txcore: error: {printable(str(error))}{see}")


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="txcore", description="Explicit collectives for JAX, and their proof.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_command(commands)
    return parser
