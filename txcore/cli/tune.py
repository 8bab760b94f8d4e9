"""`txcore tune`: measure the kernels on this machine, and store which are the fastest."""

import argparse
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from txcore.cli.errors import BadInput, BadUsage
from txcore.cli.load import parse_path, parse_positive
from txcore.cli.output import show

if TYPE_CHECKING:
    from txcore.kernels.dispatch.tuning_file import Entry
    from txcore.kernels.tuning.measure import Measured
    from txcore.kernels.tuning.shapes import Shape

_DTYPES = ("float32", "bfloat16", "float16")
# Those of kernels.dispatch.back_ends, which imports jax; a test compares them.
_IMPLEMENTATIONS = (
    *("xla", "pallas", "pallas_triton", "mosaic_gpu", "mosaic_tpu", "triton_ir", "jax_triton"),
)
_ROUNDS = 7


def add_command(commands: Any) -> None:
    """Add the command to the parser's subparsers."""
    parser = commands.add_parser("tune", help="measure kernels, and write down the fastest")
    parser.add_argument("ops", nargs="*", metavar="OP", help="conv2d, dense, ... (default all)")
    parser.add_argument(
        "--shapes", nargs="+", metavar="NAME", help="named shapes (default all of the ops)"
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="float32")
    parser.add_argument(
        "--implementation",
        nargs="+",
        choices=_IMPLEMENTATIONS,
        help="time these alone, interpreted ones too, which are never written down",
    )
    parser.add_argument(
        "--rounds", type=parse_positive, default=_ROUNDS, metavar="N", help=f"default {_ROUNDS}"
    )
    passes = parser.add_mutually_exclusive_group()
    passes.add_argument(
        "--grad",
        dest="backward",
        action="store_true",
        default=True,
        help="time the gradients with the results (default)",
    )
    passes.add_argument(
        "--forward", dest="backward", action="store_false", help="time the results alone"
    )
    parser.add_argument(
        "--cache",
        type=parse_path,
        metavar="FILE",
        help="the file to write (default $TXCORE_TUNING, or txcore/tuning.json in the user's "
        "cache folder)",
    )
    parser.add_argument("--dry-run", action="store_true", help="measure, and write nothing")
    parser.set_defaults(command=tune_kernels)


def tune_kernels(options: argparse.Namespace) -> int:
    """Print the candidates' times, and write the fastest; return 0."""
    from txcore.kernels.dispatch.tuned import cache_path
    from txcore.kernels.tuning.measure import measure_shape

    shapes = _select_shapes(options)
    file = None if options.dry_run else options.cache or cache_path()
    if file is not None:
        _add_to(file)  # refused before anything is measured
    elif not options.dry_run:
        raise BadUsage("TXCORE_TUNING is empty: name a file by --cache, or give --dry-run")
    for shape in shapes:
        measured = measure_shape(
            shape,
            options.dtype,
            backward=options.backward,
            rounds=options.rounds,
            named=options.implementation,
        )
        show(f"{shape.op} {shape.name} {options.dtype}\n{_format_table(measured)}")
        if file is not None and measured.entry is not None:
            _add_to(file, {measured.key: measured.entry})
    if file is not None:
        show(f"written to {file}")
    return 0


def _select_shapes(options: argparse.Namespace) -> "list[Shape]":
    from txcore.kernels.tuning.shapes import OPS, SHAPES

    _check_names("ops", options.ops, OPS)
    _check_names("--shapes", options.shapes or (), SHAPES)
    ops = options.ops or OPS
    found = [SHAPES[name] for name in options.shapes or SHAPES if SHAPES[name].op in ops]
    if options.shapes and len(found) < len(options.shapes):
        others = [name for name in options.shapes if SHAPES[name].op not in ops]
        raise BadUsage(
            f"--shapes {others[0]} is of {SHAPES[others[0]].op}, but OP names "
            f"{', '.join(options.ops)}: leave one of the two out"
        )
    return found


def _check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            raise BadUsage(f"tune needs {what} among {', '.join(known)}, but got {name!r}")


def _format_table(measured: "Measured") -> str:
    from tabulate import tabulate

    from txcore.kernels.dispatch.tuning_file import label_candidate

    entry = measured.entry
    best = label_candidate(entry.implementation, entry.config) if entry is not None else None
    least = measured.microseconds[best] if best is not None else None
    rows = [
        (
            name,
            f"{time:,.1f} µs",
            f"{time / least:.2f}x" if least is not None else "-",
            "fastest" if name == best else "",
        )
        for name, time in measured.microseconds.items()
    ]
    rows += [(name, "failed", "-", reason[:60]) for name, reason in measured.failed.items()]
    if not rows:
        return "  no candidate can run this"
    align = ("left", "right", "right", "left")
    table = tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=align)
    return textwrap.indent(table, "  ")


def _add_to(file: str, entries: "Mapping[str, Entry] | None" = None) -> None:
    """Add entries to a tuning file; called after each shape, so that Ctrl-C loses none."""
    from txcore.kernels.dispatch.tuning_file import TuningError, read_entries, write_entries

    try:
        found = read_entries(file)
        if entries is not None:
            write_entries(file, {**found, **entries})
    except TuningError as error:
        raise BadInput(str(error)) from None
