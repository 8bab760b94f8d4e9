"""`txcore trace`: what a profile says of collectives, steps and ranks."""

import argparse
import json
import math
import re
from typing import TYPE_CHECKING, Any

from txcore.cli.errors import BadInput, BadUsage
from txcore.cli.load import parse_path
from txcore.cli.output import show, writing
from txcore.outside import read_regular

if TYPE_CHECKING:
    from txcore.profiling.trace.trace import Trace

_MOST_BYTES = 1 << 28
# The kinds of HLO that the operations of `txcore bench` compile to.
_KINDS = {
    **{"psum": "all-reduce", "pmean": "all-reduce", "pmax": "all-reduce"},
    **{"all_gather": "all-gather", "reduce_scatter": "reduce-scatter"},
    **{"all_to_all": "all-to-all", "ppermute": "collective-permute"},
}
# (platform, processes, kind, group size) to (bytes of S, bytes a second) of each measured size.
Best = dict[tuple[str, int, str, int], list[tuple[int, float]]]


def add_command(commands: Any) -> None:
    """Add the command to the parser's subparsers."""
    parser = commands.add_parser("trace", help="show what a profile says of collectives and steps")
    parser.add_argument(
        "folder",
        type=parse_path,
        metavar="DIR",
        help="of tx.profile or jax.profiler.trace, or an .xplane.pb",
    )
    parser.add_argument(
        "--hlo",
        type=parse_path,
        metavar="FILE",
        action="append",
        default=[],
        help="optimized HLO of a program that ran, where DIR does not hold it",
    )
    parser.add_argument(
        "--program", metavar="NAME", help="the module whose runs are the steps (default: longest)"
    )
    parser.add_argument(
        "--bench",
        type=parse_path,
        metavar="FILE",
        help="compare with what `txcore bench --json FILE` measured (default: its --record)",
    )
    parser.add_argument(
        "--check", action="store_true", help="exit 1 where a collective ran that is not declared"
    )
    parser.add_argument(
        "--against", type=parse_path, metavar="DIR", help="show what changed since this profile"
    )
    parser.add_argument(
        "--html", type=parse_path, metavar="FILE", help="write the report as a page, too"
    )
    parser.add_argument(
        "--perfetto",
        type=parse_path,
        metavar="FILE",
        help="write all ranks on one clock for ui.perfetto.dev, too",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(command=show_trace)


def show_trace(options: argparse.Namespace) -> int:
    """Print the report; with --check return 1 where a collective ran that is not declared."""
    from txcore.profiling.trace.show.changes import compare_traces, format_changes
    from txcore.profiling.trace.show.table import describe_trace, format_trace

    if options.json and options.against is not None:
        raise BadUsage("--against is for people: compare two --json outputs instead")
    texts = [_read_text(file) for file in options.hlo]
    best = _read_recorded() if options.bench is None else _read_bench(options.bench)
    trace = _read_folder(options.folder, options.program, texts, best)
    earlier = None
    if options.against is not None:
        earlier = _read_folder(options.against, options.program, texts, best)
    _write_files(trace, options)
    if earlier is not None:
        show(f"since the earlier trace:\n{format_changes(compare_traces(earlier, trace))}\n")
    show(json.dumps(describe_trace(trace), sort_keys=True) if options.json else format_trace(trace))
    return 1 if options.check and not trace.ok else 0


def _read_folder(folder: str, program: str | None, texts: list[str], best: Best) -> "Trace":
    from txcore.profiling.trace.model import TraceError
    from txcore.profiling.trace.trace import read_trace

    try:
        return read_trace(folder, hlo=texts, program=program, best=best)
    except TraceError as error:
        raise BadInput(str(error)) from None


def _write_files(trace: "Trace", options: argparse.Namespace) -> None:
    from txcore.profiling.trace.show.page import write_page
    from txcore.profiling.trace.show.perfetto import write_perfetto

    for file, write in ((options.html, write_page), (options.perfetto, write_perfetto)):
        if file is not None:
            with writing(file):
                write(trace, file)


def _read_text(file: str) -> str:
    try:
        data = read_regular(file, _MOST_BYTES)
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror or error}") from None
    if data is None:
        raise BadInput(f"{file} is longer than {_MOST_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise BadInput(f"{file} is not text: give what txcore dump or bench wrote") from None


def _read_bench(file: str) -> Best:
    """Return what `txcore bench --json` measured."""
    found: Best = {}
    try:
        data = json.loads(_read_text(file))
        platform, processes = str(data["platform"]), int(data["processes"])
        for row in data["rows"]:
            size, speed = int(row["size_bytes"]), float(row["bus_bandwidth"])
            kind = _KINDS.get(row["operation"])
            if kind and size > 0 and math.isfinite(speed) and speed > 0 and not row["wrong"]:
                key = (platform, processes, kind, int(data["group_size"]))
                found.setdefault(key, []).append((size, speed))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadInput(
            f"{file} needs to be what `txcore bench --json FILE` writes: measure again"
        ) from None
    return _keep_fastest(found)


def _read_recorded() -> Best:
    """Return the means that `txcore bench --record` measured here, by the fastest algorithm."""
    from txcore.kernels.dispatch.tuned import cache_path
    from txcore.kernels.dispatch.tuning_file import TuningError, read_entries
    from txcore.profiling.bandwidth import wire_bytes

    file, found = cache_path(), Best()
    try:
        entries = {} if file is None else read_entries(file)
    except TuningError as error:
        raise BadInput(str(error)) from None
    for name, entry in entries.items():
        if (recorded := _parse_key(name)) is not None:
            key, size = recorded
            sent = wire_bytes("all-reduce", key[3], size)
            speed = sent / min(entry.microseconds.values()) * 1e6
            found.setdefault(key, []).append((size, speed))
    return _keep_fastest(found)


def _parse_key(name: str) -> tuple[tuple[str, int, str, int], int] | None:
    """Return where a mean was measured, and the bytes of its class, from its key in the file."""
    import jax.numpy as jnp

    found = re.fullmatch(r"pmean\|(\w+)\|(\w+)\|(\d+)\|devices=(\d+),processes=(\d+)", name)
    if found is None or int(found[4]) < 2:
        return None
    size = int(found[3]) * jnp.dtype(found[2]).itemsize
    return (found[1], int(found[5]), "all-reduce", int(found[4])), size


def _keep_fastest(found: Best) -> Best:
    """Keep the fastest of each size: another dtype or algorithm may be slower."""
    best: Best = {}
    for key, rows in found.items():
        fastest: dict[int, float] = {}
        for size, speed in rows:
            fastest[size] = max(speed, fastest.get(size, 0.0))
        best[key] = sorted(fastest.items())
    return best
