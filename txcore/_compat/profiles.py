"""jax's profiler: what it has recorded, and the programs that ran, as each version shows them."""

import os
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax


class ProfiledLine(NamedTuple):
    """One line of a trace: a thread or a stream, with (name, start, duration, stats) of each event.

    Times are nanoseconds.
    """

    plane: str
    name: str
    events: Iterator[tuple[str, float, float, dict[str, Any]]]


def read_profile(path: str | os.PathLike[str]) -> tuple[dict[str, dict[str, Any]], Any]:
    """Read an `.xplane.pb` by jax's own reader.

    Args:
      path: the file.

    Returns:
      The stats of each plane, and an iterator over the lines of all planes.

    Raises:
      RuntimeError: this jax has no such reader, or it cannot read the file.
    """
    reader = getattr(jax.profiler, "ProfileData", None)
    if reader is None or not hasattr(reader, "from_file"):
        raise RuntimeError(
            f"reading a trace needs jax.profiler.ProfileData of jax 0.10 to 0.12, but jax "
            f"{jax.__version__} does not have it: use an older jax"
        )
    data = reader.from_file(os.fspath(path))
    stats = {plane.name: _read_stats(plane) for plane in data.planes}
    return stats, _list_lines(data)


def _list_lines(data: Any) -> Iterator[ProfiledLine]:
    for plane in data.planes:
        for line in plane.lines:
            yield ProfiledLine(plane.name, line.name or "", _list_events(line))


def _list_events(line: Any) -> Iterator[tuple[str, float, float, dict[str, Any]]]:
    for event in line.events:
        yield event.name, event.start_ns, event.duration_ns, _read_stats(event)


def _read_stats(owner: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions say that the pairs' types will change
        return {name: value for name, value in owner.stats if name}


def profile_options() -> Any:
    """Return options that record devices and the runtime, and no call of Python; None without."""
    options = getattr(jax.profiler, "ProfileOptions", None)
    if options is None:
        return None
    chosen = options()
    for name, value in (("python_tracer_level", 0), ("host_tracer_level", 2)):
        if hasattr(chosen, name):
            setattr(chosen, name, value)
    return chosen


def live_programs(names: set[str]) -> list[tuple[str, str]]:
    """Return (name, optimized HLO) of the loaded programs with these module names.

    A jax that does not show its loaded programs has none: then those of engines alone are known.
    """
    from jax.extend import backend

    list_live = getattr(backend.get_backend(), "live_executables", None)
    live = list_live() if list_live is not None else ()
    modules = [module for executable in live for module in executable.hlo_modules()[:1]]
    return [(str(m.name), str(m.to_string())) for m in modules if m.name in names]
