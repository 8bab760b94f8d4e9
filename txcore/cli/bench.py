"""`txcore bench`: measure collectives by size, and hold their results to NumPy."""

import argparse
import contextlib
import importlib.util
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from txcore.cli.bench_options import OPTIONS, check_dtypes, select_names, walk_sizes
from txcore.cli.errors import BadInput, BadUsage, first_line
from txcore.cli.load import mesh_of, simulate_devices
from txcore.cli.output import show, show_once, writing

if TYPE_CHECKING:
    from txcore.bench import Operation, Row, Setup

_WIDE = ("float64", "int64")


def add_command(commands: Any) -> None:
    """Add the command to the parser's subparsers."""
    parser = commands.add_parser("bench", help="measure collectives by size, and check them")
    for name, option in OPTIONS.items():
        parser.add_argument(name, **option)
    parser.set_defaults(command=measure_collectives)


def measure_collectives(options: argparse.Namespace) -> int:
    """Print the tables and write the files; return 1 where an element was wrong."""
    from txcore.bench import report
    from txcore.kernels.tuning.measure import describe_machine

    names = select_names(options)
    check_dtypes(options)
    sizes = list(walk_sizes(options))
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise BadInput("--plot needs matplotlib: pip install 'txcore[examples]'")
    file = _find_tuning_file(options) if options.record else None
    join_run(options)
    setup = _make_setup(options)
    operations = _select_operations(options, names, setup)
    if options.record:
        _refuse_simulated(operations)
    run = report.describe_run(setup, describe_machine())
    show_once(report.format_run(run))
    with _wide_dtypes(options.dtype):
        rows = [
            row
            for operation in operations
            for row in _measure_operation(setup, operation, options.dtype, sizes)
        ]
    _write_files(options, run, rows)
    if file is not None:
        _record_fastest(file, setup, rows, run["machine"])
    wrong = sum(row.wrong for row in rows)
    if wrong:
        show_once(f"failed: {wrong} wrong elements")
    return 1 if wrong else 0


def _find_tuning_file(options: argparse.Namespace) -> str:
    """Return the file to record in, before anything is measured."""
    from txcore.kernels.dispatch.tuned import cache_path
    from txcore.kernels.dispatch.tuning_file import TuningError, read_entries

    exact = {*(options.algorithm or ())} - {"bf16_wire"}
    if "all" not in exact and len(exact) < 2:
        raise BadUsage("--record compares exact algorithms: give --algorithm all, or two or more")
    file = cache_path()
    if file is None:
        raise BadUsage(
            "--record needs a tuning file, but TXCORE_TUNING is empty: name a file by it"
        )
    try:
        read_entries(file)
    except TuningError as error:
        raise BadInput(str(error)) from None
    return file


def _refuse_simulated(operations: list["Operation"]) -> None:
    for operation in operations:
        if operation.simulated:
            raise BadUsage(
                f"--record needs measured times, and {operation.algorithm} is simulated on cpu: "
                "leave it out"
            )


def _record_fastest(file: str, setup: "Setup", rows: list["Row"], machine: str) -> None:
    import jax

    from txcore.bench.record import record_fastest
    from txcore.kernels.dispatch.tuning_file import TuningError

    if jax.process_index():
        return
    try:
        for dtype, size, algorithm in record_fastest(file, setup, rows, machine):
            show(f"fastest at {size} bytes of {dtype}: {algorithm}")
    except TuningError as error:
        raise BadInput(str(error)) from None
    show(f"written to {file}")


def _select_operations(
    options: argparse.Namespace, names: tuple[str, ...], setup: "Setup"
) -> list["Operation"]:
    """Return the collectives, and a mean by each algorithm in the place of `pmean`."""
    from txcore.bench import OPERATIONS

    chosen: list[Operation] = []
    for name in names:
        if name == "pmean" and options.algorithm is not None:
            chosen += _select_means(options.algorithm, setup)
        else:
            chosen.append(OPERATIONS[name])
    return chosen


def _select_means(named: tuple[str, ...], setup: "Setup") -> list["Operation"]:
    """Return a mean by each algorithm that was named; of all, by those that can run."""
    from txcore.bench import algorithms_for, mean_by

    platform = setup.mesh.devices.flat[0].platform
    sizes = [setup.mesh.shape[axis] for axis in setup.axes]
    lacks = algorithms_for(sizes, platform)
    if "all" in named:
        return [mean_by(name) for name, lack in lacks.items() if not lack]
    # Some run only where they are named: as kernels of TPUs, which a CPU simulates, slowly.
    could = algorithms_for(sizes, "tpu")
    for name in named:
        if name not in lacks:
            raise BadUsage(f"--algorithm needs names among {', '.join(lacks)}, all; got {name!r}")
        if could[name]:
            axes = ",".join(f"{axis}={setup.mesh.shape[axis]}" for axis in setup.axes)
            raise BadUsage(f"--algorithm {name} needs {could[name]}, but got {axes} on {platform}")
    return [mean_by(name, simulated=platform == "cpu" and bool(lacks[name])) for name in named]


def join_run(options: argparse.Namespace) -> None:
    """Simulate the devices, and join the other ranks where there are some."""
    from txcore import launch

    simulate_devices(options.devices)
    if launch.backend_started():
        return  # called from a program that has joined already
    try:
        launch.initialize()
    except (RuntimeError, ValueError) as error:
        raise BadInput(first_line(error)) from error


def _make_setup(options: argparse.Namespace) -> "Setup":
    import jax

    from txcore.bench import Setup

    try:
        count = jax.device_count()
    except RuntimeError as error:
        raise BadInput(first_line(error)) from error
    sizes = options.mesh or {"data": count}
    if jax.process_count() > 1 and math.prod(sizes.values()) != count:
        raise BadInput(
            f"--mesh needs sizes whose product is {count}, the devices of all "
            f"{jax.process_count()} processes, but got {math.prod(sizes.values())}"
        )
    axes = options.axis or (next(iter(sizes)),)
    for axis in axes:
        if axis not in sizes:
            raise BadUsage(f"--axis needs an axis of the mesh, {', '.join(sizes)}, got {axis!r}")
    if math.prod(sizes[axis] for axis in axes) < 2:
        raise BadInput(
            f"bench needs at least 2 devices along {','.join(axes)}, but there is 1: give "
            "--devices 2 to simulate them on the CPU, or run it by txcore launch -n 2 -m txcore "
            "bench"
        )
    return Setup(
        mesh_of(sizes),
        axes,
        warmup=options.warmup,
        iterations=options.iterations,
        in_place=not options.out_of_place,
    )


@contextlib.contextmanager
def _wide_dtypes(dtypes: tuple[str, ...]) -> Iterator[None]:
    """Let jax compute in 64 bits where a dtype has as many."""
    import jax

    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", before or not set(dtypes).isdisjoint(_WIDE))
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def _measure_operation(
    setup: "Setup", operation: "Operation", dtypes: tuple[str, ...], sizes: list[int]
) -> Iterator["Row"]:
    """Measure one collective, and print each row when it is there."""
    from txcore.bench import measure_size, report

    show_once(report.format_head(operation, setup))
    for dtype in dtypes:
        for size in sizes:
            try:
                row = measure_size(setup, operation, dtype, size)
            except (ValueError, TypeError) as error:
                raise BadInput(str(error)) from error
            except RuntimeError as error:  # of XLA or gloo
                raise BadInput(f"{operation.name} of {dtype}: {first_line(error)}") from error
            show_once(report.format_row(row))
            yield row


def _write_files(options: argparse.Namespace, run: dict[str, Any], rows: list["Row"]) -> None:
    """Write the files that were asked for; rank 0 alone."""
    import jax

    from txcore.bench import report

    if jax.process_index():
        return
    if file := options.json:
        with writing(file):
            report.write_json(file, run, rows)
    if file := options.csv:
        with writing(file):
            report.write_csv(file, rows)
    if file := options.plot:
        with writing(file, ValueError):  # of a picture's format that matplotlib does not know
            report.plot_bandwidth(file, report.format_run(run).replace("# ", ""), rows)
