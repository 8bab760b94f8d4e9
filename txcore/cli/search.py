"""`txcore costs --search`: the largest batch that fits, and the cheapest mesh of a target."""

import argparse
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from txcore.cli.errors import BadInput, BadUsage, blame_user_line, first_line
from txcore.cli.load import add_to_import_path, load_factory, search_target
from txcore.cli.output import show

if TYPE_CHECKING:  # the real imports are in the functions: `txcore --help` must not wait for jax
    from txcore.profiling.cost.search import Choice, Found, Outcome
    from txcore.profiling.targets import Target

_SECONDS = 600.0


def add_options(parser: Any) -> None:
    """Add the options of a search to the parser of `txcore costs`."""
    search = parser.add_argument_group("search")
    search.add_argument(
        "--search",
        metavar="data,model",
        type=_parse_names,
        help="try all meshes of the target over these axes, and show the cheapest",
    )
    search.add_argument(
        "--batch",
        metavar="64,128",
        type=_parse_counts,
        default=(),
        help="rows of the global batch to try: FACTORY(mesh, batch=N)",
    )
    search.add_argument(
        "--remat",
        metavar="none,full",
        type=_parse_names,
        default=(),
        help="rematerialisation policies to try, the one that keeps the most first: "
        "FACTORY(mesh, remat=NAME)",
    )
    search.add_argument(
        "--seconds",
        metavar="S",
        type=_parse_seconds,
        default=None,
        help=f"compile no further program after that time (default {_SECONDS:.0f})",
    )


def _parse_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not all(name.isidentifier() for name in names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"needs different names as data,model, got {text!r}")
    return names


def _parse_counts(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"needs counts from 1 on as 64,128, got {text!r}")
    return tuple(map(int, parts))


def _parse_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"needs a number of seconds above 0, got {text!r}")
    return seconds


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that do not go together.

    Raises:
      BadUsage: what is wrong, and what to give instead.
    """
    if options.search is None:
        if options.batch or options.remat or options.seconds is not None:
            raise BadUsage(
                "--batch, --remat and --seconds need --search AXES: give the mesh's axes"
            )
        return
    if options.target is None:
        raise BadUsage("--search needs --target T: the machine whose meshes are tried")
    if options.mesh:
        raise BadUsage("--search tries all meshes of its axes, but got --mesh too: leave one out")


def print_search(options: argparse.Namespace) -> int:
    """Search, print a table; return 1 if nothing fits or the best program's report is not ok."""
    from txcore.profiling.cost.search import list_meshes, search_programs

    target = search_target(options.target)
    with add_to_import_path(options.factory):
        factory = load_factory(options.factory)
        _check_factory(factory, options)
        found = search_programs(
            list_meshes(target.size, options.search),
            options.batch,
            options.remat,
            lambda choice: measure_choice(factory, options.factory, target, choice),
            seconds=options.seconds or _SECONDS,
        )
    if not found.outcomes:
        if found.stopped:
            raise BadInput("the time was up before a program was compiled: give --seconds more")
        why = f": {found.refused[0][1]}" if found.refused else ""
        raise BadInput(f"{options.factory} takes none of the meshes and batches{why}")
    show(json.dumps(to_dict(found)) if options.json else "\n".join(write_table(found, target)))
    return 0 if found.best is not None and found.best.status != "failed" else 1


def _check_factory(factory: Callable[..., Any], options: argparse.Namespace) -> None:
    given = _keywords(1 if options.batch else 0, "x" if options.remat else "")
    try:
        inspect.signature(factory).bind(None, **given)
    except TypeError:
        call = ", ".join(["mesh", *(f"{name}=" for name in given)])
        raise BadInput(f"{options.factory} needs to take ({call}) for this search") from None


def _keywords(rows: int, remat: str) -> dict[str, Any]:
    return {**({"batch": rows} if rows else {}), **({"remat": remat} if remat else {})}


def measure_choice(
    factory: Callable[..., Any], name: str, target: "Target", choice: "Choice"
) -> "Outcome":
    """Compile a choice for the target, and read what it costs.

    Raises:
      RefusedError: the factory, or jax, finds that its sizes do not go together.
      BadInput: anything else is wrong with the program.
    """
    from txcore.profiling.cost.search import Outcome, RefusedError
    from txcore.profiling.costs import costs_of
    from txcore.profiling.program import compile_for_target

    print(f"compiling {choice}", file=sys.stderr, flush=True)
    assert target.chip is not None
    memory = int(target.chip.hbm_bytes)
    try:
        built = factory(target.mesh(dict(choice.mesh)), **_keywords(choice.rows, choice.remat))
    except ValueError as error:
        raise RefusedError(first_line(error)) from error
    except (Exception, SystemExit) as error:
        raise BadInput(f"{name} failed: {blame_user_line(error)}") from error
    try:
        program = compile_for_target(lambda: built, target.name, None)
    except ValueError as error:  # jax's, of sizes that a mesh does not divide
        raise RefusedError(blame_user_line(error)) from error
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):  # XLA for TPU gives up where memory is short
            return Outcome(choice, float("inf"), None, memory, "")
        raise BadInput(
            f"{name} does not compile with {choice}: {blame_user_line(error)}"
        ) from error
    found = costs_of(program)
    seconds, peak = found.schedule.seconds, found.memory.peak if found.memory else None
    assert seconds is not None  # the target's peaks are known
    return Outcome(choice, seconds, peak, memory, found.report.status, found.schedule.remade_flops)


def to_dict(found: "Found") -> dict[str, Any]:
    """Return a search as plain lists, numbers and strings; times are in seconds."""
    return {
        "best": _outcome_dict(found.best),
        "largest": _outcome_dict(found.largest),
        "compiled": found.compiled,
        "possible": found.possible,
        "stopped": found.stopped,
        "programs": [_outcome_dict(outcome) for outcome in found.outcomes],
        "refused": [{**_choice_dict(choice), "why": why} for choice, why in found.refused],
    }


def _outcome_dict(outcome: "Outcome | None") -> dict[str, Any] | None:
    if outcome is None:
        return None
    return {
        **_choice_dict(outcome.choice),
        "seconds": outcome.seconds if outcome.peak is not None else None,
        "peak": outcome.peak,
        "memory": outcome.memory,
        "fits": outcome.fits,
        "status": outcome.status,
        "remade_flops": outcome.remade_flops,
    }


def _choice_dict(choice: "Choice") -> dict[str, Any]:
    return {"mesh": dict(choice.mesh), "batch": choice.rows, "remat": choice.remat}


def write_table(found: "Found", target: "Target") -> list[str]:
    """Write a search for the terminal: the programs that fit, the fastest for a row first."""
    from tabulate import tabulate

    from txcore.profiling.cost.text import format_flops, format_seconds
    from txcore.profiling.report.numbers import format_bytes

    def cells(outcome: "Outcome") -> Sequence[str]:
        choice, peak = outcome.choice, outcome.peak
        anew = format_flops(outcome.remade_flops) if outcome.remade_flops else "-"
        return [
            ",".join(f"{name}={size}" for name, size in choice.mesh),
            str(choice.rows or "-"),
            choice.remat or "-",
            "gave up" if peak is None else format_bytes(peak),
            "yes" if outcome.fits else "no",
            "-" if peak is None else format_seconds(outcome.seconds),
            "-" if peak is None else format_seconds(outcome.cost),
            anew,
            outcome.status or "-",
        ]

    rows = sorted(found.outcomes, key=lambda o: (not o.fits, o.cost, o.peak or 0))
    head = ["mesh", "batch", "remat", "memory", "fits", "step", "a row", "XLA anew", "status"]
    table = tabulate([head, *map(cells, rows)], tablefmt="plain", disable_numparse=True)
    first, *others = table.splitlines()
    lines = [first.rstrip(), "-" * max(map(len, table.splitlines())), *(o.rstrip() for o in others)]
    lines.append("")
    if found.best is None:
        lines.append(f"nothing fits into {format_bytes(found.outcomes[0].memory)} of {target.name}")
    else:
        lines.append(f"cheapest: {found.best.choice}: {format_seconds(found.best.cost)} a row")
        assert found.largest is not None
        if found.largest.choice.rows:
            lines.append(f"largest batch found to fit: {found.largest.choice}")
    lines.append(
        f"{found.compiled} of {found.possible} programs compiled"
        + ("; the time was up: give --seconds more" if found.stopped else "")
    )
    if found.refused:
        lines.append(
            f"{len(found.refused)} not taken, such as {found.refused[0][0]}: {found.refused[0][1]}"
        )
    return lines
