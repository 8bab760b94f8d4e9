"""`txcore launch`: run a script in several processes, on this host or on several."""

import argparse
import contextlib
import math
import os
import pathlib
import secrets
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from txcore.cli.errors import BadInput, BadUsage
from txcore.cli.load import parse_path, parse_positive
from txcore.cli.output import complain
from txcore.launch.launcher.placement import coordinator_variables, place_ranks, resolve_reachable

if TYPE_CHECKING:
    from txcore.launch.launcher.hosts import Task

# Ranks on other hosts get the variables with these prefixes; all others are their hosts' own.
_PASSED_ON = ("JAX_", "XLA_", "TXCORE_", "NCCL_", "GLOO_", "OMP_", "PYTHON", "LD_LIBRARY_PATH")
_SSH = "ssh -o BatchMode=yes"  # a rank has no terminal to ask for a password on


def add_command(commands: Any) -> None:
    """Add the command to the parser's subparsers."""
    parser = commands.add_parser(
        "launch",
        help="run a script in several processes",
        usage="txcore launch -n N [options] [--] SCRIPT.py ARGS... | -m MODULE ARGS... | "
        "COMMAND ARGS...",
    )
    parser.add_argument(
        "-n", type=parse_positive, required=True, dest="size", metavar="N", help="ranks"
    )
    parser.add_argument(
        "-m", dest="module", action="store_true", help="run a module, as python -m does"
    )
    parser.add_argument(
        "--devices-per-process",
        type=parse_positive,
        metavar="D",
        help="GPUs of each rank, or devices that it simulates on the CPU",
    )
    parser.add_argument("--hosts", metavar="A,B[:SLOTS]", help="default: all ranks on this host")
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="where rank 0 listens (default: a port of 127.0.0.1, or of the first host)",
    )
    parser.add_argument(
        "--output-dir", metavar="DIR", type=parse_path, help="one file a rank: rank-0.out, .err"
    )
    parser.add_argument(
        "--remote-shell", metavar="CMD", default=_SSH, help=f"how to reach hosts (default {_SSH})"
    )
    parser.add_argument(
        "-x",
        dest="export",
        action="append",
        default=[],
        metavar="NAME",
        help="a variable that ranks on other hosts get too, beside JAX_*, XLA_*, NCCL_*, ...",
    )
    parser.add_argument(
        "--grace",
        type=_parse_seconds,
        default=30.0,
        metavar="SECONDS",
        help="from asking ranks to end to killing them (default 30)",
    )
    parser.add_argument(
        "--idle",
        type=_parse_seconds,
        default=1800.0,
        metavar="SECONDS",
        help="after some ranks have ended well, from when the others do nothing to ending them "
        "(default 1800; ranks on other hosts are waited for)",
    )
    parser.add_argument(
        "--lock",
        type=parse_path,
        metavar="FILE",
        help="the training step of the ranks' engines, and what runs in tx.attested(), has to be "
        "the program that is locked there",
    )
    parser.add_argument(
        "--update-lock", action="store_true", help="lock what the ranks run in --lock FILE instead"
    )
    parser.add_argument(
        "--no-pin", dest="pin", action="store_false", help="let every rank use all cores"
    )
    parser.add_argument("program", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(command=run_ranks)


def _parse_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"needs seconds, 0 or more, but got {text!r}")
    return seconds


def run_ranks(options: argparse.Namespace) -> int:
    """Run the ranks; return 0, or the exit code of the one that failed first."""
    from txcore.launch.launcher import supervise as local

    folder = None if options.output_dir is None else pathlib.Path(options.output_dir)
    with contextlib.ExitStack() as held:
        tasks = make_tasks(options, held)
        shell = _split_remote_shell(options) if any(task.host for task in tasks) else []
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            failure = local.launch_ranks(
                tasks,
                remote_shell=shell,
                output_dir=folder,
                grace_s=options.grace,
                idle_s=options.idle,
            )
        except (OSError, ValueError) as error:
            raise BadInput(f"launch cannot start the ranks: {error}") from error
        unheld = _find_unheld(options, tasks) if failure is None else ""
    if failure is None:
        if unheld:
            complain(f"txcore: {unheld}")
        return 1 if unheld else 0
    lines = [f"[{failure.rank}] {line}" for line in failure.tail]
    complain("\n".join([*lines, f"txcore: {failure.text}"]))
    return failure.exit_code


def _lock_variables(options: argparse.Namespace, held: contextlib.ExitStack) -> dict[str, str]:
    if options.lock is None:
        if options.update_lock:
            raise BadUsage("--update-lock needs the file to write: give --lock FILE too")
        return {}
    file = os.path.abspath(options.lock)
    if not options.update_lock and not os.path.isfile(file):
        raise BadInput(f"--lock needs a lock file, but there is none at {file}: --update-lock")
    options.notes = held.enter_context(tempfile.TemporaryDirectory(prefix="txcore-lock-"))
    own = {"TXCORE_LOCK": file, "TXCORE_LOCK_NOTES": options.notes}
    return own | ({"TXCORE_LOCK_UPDATE": "1"} if options.update_lock else {})


def _find_unheld(options: argparse.Namespace, tasks: "Sequence[Task]") -> str:
    """Describe which ranks of this host ended well without a program that was held to --lock."""
    if options.lock is None:
        return ""
    ranks = [task.rank for task in tasks if not task.host]
    unheld = [str(rank) for rank in ranks if not os.path.exists(f"{options.notes}/{rank}")]
    if not unheld:
        return ""
    return (
        f"--lock {options.lock} held nothing on rank {', '.join(unheld)}: no engine trained "
        "there, and no program ran in tx.attested()"
    )


def make_tasks(options: argparse.Namespace, held: contextlib.ExitStack) -> "list[Task]":
    """Return the task of each rank: what it runs, and where.

    Args:
      options: of the command.
      held: keeps the coordinator's port from other launchers of this host until it is closed.

    Raises:
      BadInput: a host, a port, a GPU or the program is not available.
    """
    from txcore.launch.join.rendezvous import RUN_VARIABLE
    from txcore.launch.launcher.hosts import Task, gpus_of

    argv = _make_command(options)
    hosts = place_ranks(options.size, options.hosts)
    if options.remote_shell == _SSH:  # other shells may have their own names for hosts
        for host in filter(None, dict.fromkeys(hosts)):
            resolve_reachable(host)
    environment = coordinator_variables(options.coordinator, hosts, held)
    environment["JAX_NUM_PROCESSES"] = str(options.size)
    # Unbuffered, so that output is not lost when a rank is killed.
    environment["PYTHONUNBUFFERED"] = os.environ.get("PYTHONUNBUFFERED", "1")
    if options.devices_per_process:
        environment["JAX_NUM_CPU_DEVICES"] = str(options.devices_per_process)
    environment |= _lock_variables(options, held)
    if options.size > 1:  # a single process may belong to another run
        environment[RUN_VARIABLE] = secrets.token_hex(8)
    passed_on, cwd = _select_variables(options.export), os.getcwd()
    tasks = []
    for rank, host in enumerate(hosts):
        local, size = hosts[:rank].count(host), hosts.count(host)
        own = {"JAX_PROCESS_ID": str(rank), "JAX_LOCAL_PROCESS_ID": str(local)}
        variables = (passed_on if host else {}) | environment | own
        devices = options.devices_per_process
        task = Task(rank, argv, variables, cwd, host, local, size, devices, options.pin)
        try:
            if not host:
                gpus_of(task, os.environ)
        except ValueError as error:
            raise BadInput(str(error)) from error
        tasks.append(task)
    return tasks


def _make_command(options: argparse.Namespace) -> list[str]:
    """Return the command to run: a script or module with this interpreter, any other as it is."""
    program = options.program[1:] if options.program[:1] == ["--"] else options.program
    if not program:
        raise BadUsage("launch needs SCRIPT.py, -m MODULE or a command")
    if options.module:
        return [sys.executable, "-m", *program]
    if program[0].endswith(".py"):
        if not os.path.isfile(program[0]):
            raise BadInput(f"launch needs a script, but there is no file {program[0]}")
        return [sys.executable, *program]
    if shutil.which(program[0]) is None:
        raise BadInput(f"launch needs SCRIPT.py or a command, but found no command {program[0]}")
    return [*program]


def _select_variables(export: Sequence[str]) -> dict[str, str]:
    for name in export:
        if name not in os.environ:
            raise BadInput(f"-x needs a variable that is set, but {name} is not")
    return {k: v for k, v in os.environ.items() if k.startswith(_PASSED_ON) or k in export}


def _split_remote_shell(options: argparse.Namespace) -> list[str]:
    """Return the words of --remote-shell; refuse paths that a remote shell would split."""
    from txcore.launch.launcher import hosts

    try:
        words = shlex.split(options.remote_shell)
    except ValueError as error:
        raise BadInput(f"--remote-shell {options.remote_shell!r}: {error}") from error
    if not words or shutil.which(words[0]) is None:
        raise BadInput(f"--remote-shell needs a command, but got {options.remote_shell!r}")
    for file in (sys.executable, hosts.__file__):
        if shlex.quote(file) != file:
            raise BadInput(f"--hosts needs a path without spaces and such, but Python's is {file}")
    return words
