"""`txcore launch`: run a script in several processes, on this host or on several."""

import argparse
import contextlib
import math
import os
import pathlib
import random
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from txcore.cli.load import BadInput, positive

if TYPE_CHECKING:
    from txcore.launch.hosts import Task

# What a rank on another host is given of our environment; its own host has the rest.
_PASSED_ON = ("JAX_", "XLA_", "TXCORE_", "NCCL_", "GLOO_", "OMP_", "PYTHON", "LD_LIBRARY_PATH")
_SSH = "ssh -o BatchMode=yes"  # a rank has no terminal on which to ask for a password
_HOST = r"(?:\w[\w.-]*@)?(?:\w[\w.-]*|\[[\da-fA-F:.]+\])"  # nothing that ssh takes for an option
_EPHEMERAL = pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST_PORT = 20000  # below lie the ports of known services


def add(commands: Any) -> None:
    """Add the command to the parser's subparsers."""
    parser = commands.add_parser(
        "launch",
        help="run a script in several processes",
        usage="txcore launch -n N [options] [--] SCRIPT.py ARGS... | -m MODULE ARGS... | "
        "COMMAND ARGS...",
    )
    parser.add_argument("-n", type=positive, required=True, dest="size", metavar="N", help="ranks")
    parser.add_argument(
        "-m", dest="module", action="store_true", help="run a module, as python -m does"
    )
    parser.add_argument(
        "--devices-per-process",
        type=positive,
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
        "--output-dir", metavar="DIR", type=pathlib.Path, help="one file a rank: rank-0.out, .err"
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
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="from asking ranks to end to killing them (default 30)",
    )
    parser.add_argument(
        "--no-pin", dest="pin", action="store_false", help="let every rank use all cores"
    )
    parser.add_argument("program", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(command=run)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"needs seconds, 0 or more, but got {text!r}")
    return seconds


def run(options: argparse.Namespace) -> int:
    """Run the ranks; return 0, or the exit code of the one that failed first."""
    from txcore.launch import local

    folder = options.output_dir
    with contextlib.ExitStack() as held:
        tasks = make_tasks(options, held)
        shell = _remote_shell(options) if any(task.host for task in tasks) else []
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            failure = local.launch(
                tasks, remote_shell=shell, output_dir=folder, grace_s=options.grace
            )
        except (OSError, ValueError) as error:
            raise BadInput(f"launch cannot start the ranks: {error}") from error
    if failure is None:
        return 0
    lines = [f"[{failure.rank}] {line}" for line in failure.tail]
    with contextlib.suppress(OSError):  # nobody reads it
        print(*lines, f"txcore: {failure.text}", sep="\n", file=sys.stderr)
    return failure.exit_code


def make_tasks(options: argparse.Namespace, held: contextlib.ExitStack) -> "list[Task]":
    """Return what each rank runs, and where.

    Args:
      options: of the command.
      held: until its end no other launcher of this host takes the coordinator's port.

    Raises:
      BadInput: something cannot be had.
    """
    from txcore.launch.hosts import Task, gpus_of

    argv = _argv(options)
    hosts = place(options.size, options.hosts)
    environment = _coordinator(options, hosts, held)
    environment["JAX_NUM_PROCESSES"] = str(options.size)
    # What is printed before a rank is killed must not stay in its buffer.
    environment["PYTHONUNBUFFERED"] = os.environ.get("PYTHONUNBUFFERED", "1")
    if options.devices_per_process:
        environment["JAX_NUM_CPU_DEVICES"] = str(options.devices_per_process)
    passed_on, cwd = _passed_on(options.export), os.getcwd()
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


def _argv(options: argparse.Namespace) -> list[str]:
    """Return the command: a script or a module by this interpreter, anything else as it is."""
    program = options.program[1:] if options.program[:1] == ["--"] else options.program
    if not program:
        raise BadInput("launch needs SCRIPT.py, -m MODULE or a command (see txcore launch --help)")
    if options.module:
        return [sys.executable, "-m", *program]
    if program[0].endswith(".py"):
        if not os.path.isfile(program[0]):
            raise BadInput(f"launch needs a script, but there is no file {program[0]}")
        return [sys.executable, *program]
    if shutil.which(program[0]) is None:
        raise BadInput(f"launch needs SCRIPT.py or a command, but found no command {program[0]}")
    return [*program]


def _passed_on(export: Sequence[str]) -> dict[str, str]:
    for name in export:
        if name not in os.environ:
            raise BadInput(f"-x needs a variable that is set, but {name} is not")
    return {k: v for k, v in os.environ.items() if k.startswith(_PASSED_ON) or k in export}


def _remote_shell(options: argparse.Namespace) -> list[str]:
    """Return the words of --remote-shell; they go through a shell on the way, or not."""
    from txcore.launch import hosts

    try:
        words = shlex.split(options.remote_shell)
    except ValueError as error:
        raise BadInput(f"--remote-shell {options.remote_shell!r}: {error}") from error
    if not words or shutil.which(words[0]) is None:
        raise BadInput(f"--remote-shell needs a command, but got {options.remote_shell!r}")
    for path in (sys.executable, hosts.__file__):
        if shlex.quote(path) != path:
            raise BadInput(f"--hosts needs a path without spaces and such, but Python's is {path}")
    return words


def place(size: int, hosts: str | None) -> list[str]:
    """Return the host of each rank, in order; "" for this one.

    Args:
      size: how many ranks there are.
      hosts: "A,B:4", each with the number of ranks that it takes at most (1 where only others
        say); where none says the ranks are spread evenly. None: all are here.

    Raises:
      BadInput: the text is no such list, or has too few slots.

    Example:
      >>> from txcore.cli import launch
      >>> launch.place(3, "a,b"), launch.place(3, "a:1,localhost:4")
      (['a', 'a', 'b'], ['a', '', ''])
    """
    found = _hosts(hosts or "localhost")
    limited = any(slots for _, slots in found)
    total = sum(slots or 1 for _, slots in found)
    if limited and total < size:
        raise BadInput(f"--hosts {hosts} has {total} slots, but -n asks for {size} ranks")
    each, more = divmod(size, len(found))
    even = [each + (i < more) for i in range(len(found))]
    sizes = [slots or 1 for _, slots in found] if limited else even
    ranks = [name for (name, _), count in zip(found, sizes, strict=True) for _ in range(count)]
    return ranks[:size]


def _hosts(text: str) -> list[tuple[str, int | None]]:
    """Return each host's name, "" for this one, and its slots if it says."""
    own = socket.gethostname()
    here = ("localhost", "127.0.0.1", "[::1]", own, own.partition(".")[0])
    found: list[tuple[str, int | None]] = []
    for part in text.split(","):
        match = re.fullmatch(rf"({_HOST})(?::0*([1-9]\d{{0,5}}))?", part, re.ASCII)
        if match is None:
            raise BadInput(f"--hosts needs hosts as in A,B or A:2,B:4, but got {text!r}")
        name = "" if match[1] in here else match[1]
        if name in [other for other, _ in found]:
            raise BadInput(f"--hosts needs each host once, as in A:4, but got {text!r}")
        found.append((name, int(match[2]) if match[2] else None))
    return found


def _coordinator(
    options: argparse.Namespace, hosts: Sequence[str], held: contextlib.ExitStack
) -> dict[str, str]:
    """Return where rank 0 listens, and there alone: by itself jax listens on all interfaces."""
    from txcore.launch import network

    others = [host for host in dict.fromkeys(hosts) if host]
    if options.remote_shell == _SSH:  # other ones may call hosts by names of their own
        for host in others:
            _resolve(host)
    bind = None
    if options.coordinator is not None:
        try:
            name, port = network.split_address(options.coordinator)
        except ValueError:
            given = options.coordinator
            raise BadInput(f"--coordinator needs HOST:PORT, but got {given!r}") from None
        address = _resolve(name, hosts)
        bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
        if not hosts[0] and not bind:
            _check_port(options.coordinator, address, port)
    elif hosts[0]:
        address, port = _resolve(hosts[0], hosts), random.choice(_ports())
    else:
        address = _own_address(others[0]) if others else "127.0.0.1"
        port = _hold_port(address, held)
    chosen = network.join_address(address, port)
    return {
        "JAX_COORDINATOR_ADDRESS": options.coordinator or chosen,
        "JAX_COORDINATOR_BIND_ADDRESS": bind or chosen,
    }


def _resolve(host: str, hosts: Sequence[str] = ()) -> str:
    """Return a host's address, which all of `hosts` are to reach."""
    from txcore.launch import network

    name = host.rpartition("@")[2].strip("[]")
    try:
        address = network.resolve(name, 0)
    except (OSError, UnicodeError) as error:
        raise BadInput(
            f"host {name} does not resolve ({error}): name one that does, or give --coordinator "
            "and a --remote-shell that knows it"
        ) from error
    if len({*hosts}) > 1 and name != address and network.is_loopback(address):
        raise BadInput(
            f"{name} is {address} here, where other hosts do not reach it: give --coordinator with "
            "an address that they do"
        )
    return address


def _own_address(host: str) -> str:
    """Return the address of this host that another sees."""
    from txcore.launch import network

    address = _resolve(host)
    try:
        return network.address_towards(address, 9)
    except OSError as error:
        raise BadInput(f"there is no way to {host} ({error}): give --coordinator") from error


def _ports() -> list[int]:
    """Return the ports that the system does not itself hand out to connections."""
    try:
        low, high = map(int, _EPHEMERAL.read_text().split())
    except (OSError, ValueError):
        low, high = 49152, 65535  # RFC 6335
    return [*range(_FIRST_PORT, low), *range(high + 1, 2**16)] or [*range(low, high + 1)]


def _hold_port(address: str, held: contextlib.ExitStack) -> int:
    """Return a port at which nobody listens; where the system can, hold it against others.

    Rank 0 can listen there still: a bound socket that does not listen is in the way only of those
    who do not share. (jax shares its port with every other coordinator of the same user.)
    """
    ports = _ports()
    for port in random.sample(ports, min(len(ports), 100)):
        holder = held.enter_context(_socket(address))
        try:
            holder.bind((address, port))
        except OSError:
            holder.close()
            continue
        if sys.platform == "linux":
            for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
                holder.setsockopt(socket.SOL_SOCKET, option, 1)
        else:
            holder.close()
        return port
    raise BadInput(f"no port of {address} is free: give --coordinator")


def _check_port(given: str, address: str, port: int) -> None:
    with _socket(address) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise BadInput(
                f"--coordinator {given}: rank 0 cannot listen there ({error.strerror})"
            ) from error


def _socket(address: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
