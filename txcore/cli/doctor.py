"""`txcore doctor`: show what this machine is, and hold its collectives to NumPy."""

import argparse
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from txcore.cli.bench import join_run
from txcore.cli.load import parse_devices, parse_path, parse_positive
from txcore.cli.output import complain, show_once, writing
from txcore.launch.watch.verdict import rank_names

if TYPE_CHECKING:
    from txcore.bench import Setup
    from txcore.doctor import Checked

HUNG = 3  # the exit code where a collective does not return


def add_command(commands: Any) -> None:
    """Add the command to the parser's subparsers."""
    parser = commands.add_parser("doctor", help="examine this machine and its collectives")
    parser.add_argument(
        "--devices", type=parse_devices, metavar="N", help="simulate N CPU devices a process"
    )
    parser.add_argument(
        "--limit",
        type=parse_positive,
        default="30",
        metavar="SECONDS",
        help="after which a collective hangs (default 30)",
    )
    parser.add_argument("--json", type=parse_path, metavar="FILE", help="write it all, too")
    parser.set_defaults(command=examine_machine)


def examine_machine(options: argparse.Namespace) -> int:
    """Print facts, limits and what each collective did; return 1 where one was wrong."""
    join_run(options)
    import jax

    from txcore import doctor

    found: dict[str, Any] = {"facts": {}}
    for section in doctor.list_facts():
        found["facts"][section.title] = section.rows
        show_once(_format_section(section.title, section.rows))
    found["limits"] = [limit._asdict() for limit in doctor.find_limits()]
    show_once(_format_section("limits", [(f["what"], f"-> {f['do']}") for f in found["limits"]]))
    checked = list(_check_all(options.limit))
    found["collectives"] = [vars(one) for one in checked]
    if options.json and jax.process_index() == 0:
        _write_json(options.json, found)
    failed = [one for one in checked if not one.ok]
    show_once(_conclude(checked, failed))
    return 1 if failed else 0


def _check_all(limit: int) -> Iterator["Checked"]:
    """Check the collectives, a line for each; end the process where one does not return."""
    import itertools

    from txcore import doctor

    setups = _make_setups()
    if not setups:
        show_once("collectives\n  none: there is 1 device; --devices 2 simulates two on the CPU")
        return
    groups = ", ".join(f"{setup.groups} x {setup.group_size}" for setup in setups)
    show_once(f"collectives in groups of devices, {groups}, against NumPy")
    with doctor.Watchdog(limit, lambda what: _end_hung(what, limit)) as watchdog:
        every = doctor.check_collectives(setups, watchdog.begin)
        for name, of_name in itertools.groupby(every, lambda one: one.operation):
            checked = list(of_name)
            right = ", ".join(one.dtype for one in checked if one.ok)
            show_once(f"  {name:<15} right: {right or 'none'}")
            for one in checked:
                if not one.ok:
                    show_once(f"  {name:<15} FAILED: {one.dtype}, {_describe_failure(one)}")
            yield from checked


def _make_setups() -> list["Setup"]:
    """Return all devices as one group, and as several where their number allows it."""
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from txcore.bench import Setup

    devices = np.array(jax.devices())
    setups = [Setup(Mesh(devices, ("data",)), ("data",))] if devices.size > 1 else []
    if devices.size > 2 and devices.size % 2 == 0:
        grid = Mesh(devices.reshape(2, -1), ("data", "model"))
        setups += [Setup(grid, (axis,)) for axis in grid.axis_names]
    return setups


def _describe_failure(checked: "Checked") -> str:
    text = checked.error
    if checked.wrong:
        text = f"{checked.wrong} elements wrong on {rank_names(checked.ranks)}"
    instead = f"right instead: {checked.instead}" if checked.instead else "nothing else is right"
    return f"{text}; {instead}"


def _conclude(checked: list["Checked"], failed: list["Checked"]) -> str:
    if failed:
        names = ", ".join(f"{one.operation} of {one.dtype}" for one in failed)
        return f"failed: {names} of this backend; report it with the text above"
    return f"well: {len(checked)} checks of collectives, all as NumPy has it"


def _end_hung(what: str, limit: int) -> None:
    complain(
        f"txcore: {what} has not returned for {limit} s: this backend hangs there. Take one of "
        "those that are listed as right, or another backend (JAX_PLATFORMS=cpu); report it with "
        "the text above"
    )
    os._exit(HUNG)  # the waiting thread is in C++, and cannot be woken


def _format_section(title: str, rows: list[tuple[str, ...]]) -> str:
    from tabulate import tabulate

    lines = tabulate(rows, tablefmt="plain", disable_numparse=True).splitlines() or ["none"]
    return "\n".join([title, *(f"  {line}" for line in lines), ""])


def _write_json(path: str, found: dict[str, Any]) -> None:
    from txcore.outside import replace_text

    with writing(path):
        replace_text(path, json.dumps(found, indent=2) + "\n")
