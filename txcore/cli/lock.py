"""`txcore lock`: compare a program's communication with its lock file."""

import argparse
import os
import re
from typing import TYPE_CHECKING, Any

from txcore.cli.errors import BadInput, BadUsage
from txcore.cli.load import add_program, compile_factory, parse_allowed, parse_path, split_factory
from txcore.cli.output import show

if TYPE_CHECKING:
    from txcore.profiling import Report

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30}


def add_command(commands: Any) -> None:
    """Add the command to the parser's subparsers."""
    parser = commands.add_parser("lock", help="check a program's communication, or write it down")
    actions = parser.add_subparsers(required=True, metavar="update|check")
    update = actions.add_parser("update", help="write what the program sends into its lock file")
    update.add_argument(
        "--budget",
        type=_parse_budget,
        action="append",
        default=[],
        metavar="AXIS=SIZE",
        help="bytes on the wire that each device may send in one call, as data=2MB or data=none; "
        "kept by later updates",
    )
    update.add_argument(
        "--allow",
        type=_parse_allow,
        metavar="ORIGINS",
        help="lock what nobody asked for, too, of partitioner, boundary, unknown, so that only "
        "more of it fails; kept by later updates, none takes it away",
    )
    update.add_argument(
        "--attest",
        action="store_true",
        help="keep what the program is, too, so that a run can be held to it (tx.attested)",
    )
    update.set_defaults(command=_update_lock)
    check = actions.add_parser("check", help="exit 1 if the program sends more than its lock has")
    check.add_argument("--exact", action="store_true", help="exit 1 if it sends less, too")
    check.set_defaults(command=_check_lock)
    for action in (update, check):
        add_program(action)
        action.add_argument(
            "--file",
            type=parse_path,
            metavar="FILE",
            help="the lock file (default __collectives__/MODULE.FACTORY.lock.json)",
        )


def _parse_budget(text: str) -> tuple[str, int | None]:
    axis, _, size = text.partition("=")
    number = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([A-Za-z]*)", size)
    unit = number and _UNITS.get(number[2].lower())
    if not axis.isidentifier() or not (unit or size == "none"):
        raise argparse.ArgumentTypeError(
            f"needs an axis and a size, as data=2MB, data=1.5GiB or data=none, but got {text!r}"
        )
    return axis, round(float(number[1]) * unit) if number and unit else None


def _parse_allow(text: str) -> tuple[str, ...]:
    return () if text == "none" else parse_allowed(text)


def _update_lock(options: argparse.Namespace) -> int:
    from txcore.profiling import lock
    from txcore.profiling.audit import audit_program

    file, budgets = _lock_file(options), dict(options.budget)
    if len(budgets) < len(options.budget):
        raise BadUsage("--budget needs each axis once, but got one twice")
    program = compile_factory(options)
    proof = lock.proof_of(program) if options.attest else None
    try:
        outcome = lock.update(
            file, audit_program(program), budgets=budgets, allow=options.allow, proof=proof
        )
    except lock.LockError as error:
        raise BadInput(str(error)) from error
    show(outcome.text)
    return 0 if outcome.ok else 1


def _check_lock(options: argparse.Namespace) -> int:
    from txcore.profiling import lock

    file, report = _lock_file(options), _audit_factory(options)
    try:
        outcome = lock.check(file, report, exact=options.exact)
    except lock.LockError as error:
        raise BadInput(f"{error}; txcore lock update writes what the program sends now") from error
    show(outcome.text)
    return 0 if outcome.ok else 1


def _lock_file(options: argparse.Namespace) -> str:
    """Return the lock file's path, the same for FILE.py:FACTORY and its module."""
    if options.file is not None:
        return options.file
    module, name = split_factory(options.factory)
    if module.endswith(".py"):
        below = os.path.relpath(module).removesuffix(".py")
        if below.startswith(os.pardir):
            raise BadUsage(f"{module} is not below this folder, so its lock needs --file FILE")
        module = below.replace(os.sep, ".")
    return f"__collectives__/{module}.{name}.lock.json"


def _audit_factory(options: argparse.Namespace) -> "Report":
    from txcore.profiling.audit import audit_program

    return audit_program(compile_factory(options))
