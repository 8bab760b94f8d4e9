"""Read one process's `.xplane.pb` by jax's own reader into plain tuples.

CPU: events of devices are on threads of the host, and have `hlo_op`, `hlo_module`, `run_id` and
`device_ordinal`. An operation may go on in a pool of threads after its event; an event "end: ..."
of the same number begins when it has ended, or later: after what the same thread goes on with.
GPU: they are on the streams of a device's plane, without a run; in a command buffer (a CUDA graph)
`hlo_op` names the buffer, and the kernel's name the op.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

from txcore import _compat
from txcore.outside import open_regular
from txcore.profiling.trace.model import Event, Rank, TraceError, Work

MOST_BYTES = 1 << 31
_DEVICE = re.compile(r"/device:(GPU|TPU):(\d+)")
_INPUT = re.compile(r"txcore\.input$|DevicePut|BufferFromHost|TransferToDevice|copy_to_device")
_HOST = re.compile(r"txcore\.step\b|PjitFunction|LoadedExecutable::Execute|ParseArguments")
_PLANES, _ERRORS, _WARNINGS, _HOSTNAMES = 1, 2, 3, 4  # the fields of an XSpace


def read_events(path: str | os.PathLike[str], rank: int = 0) -> Rank:
    """Read the events of one process.

    Args:
      path: the `.xplane.pb`.
      rank: the number to give it.

    Returns:
      The process's trace, as far as the file alone tells it.

    Raises:
      TraceError: there is no such file, or it is cut off or none.
    """
    notes, host = _scan_file(path)
    try:
        planes, lines = _compat.read_profile(path)
        events, work = _sort_lines(lines)
    except Exception as error:  # of jax's reader, which raises what protobuf does
        raise TraceError(
            f"cannot read {os.fspath(path)} as a trace ({str(error).splitlines()[0][:200]}): it "
            "needs an .xplane.pb that jax.profiler or tx.profile has finished writing"
        ) from None
    ordinals = sorted({event.device for event in events})
    place = {ordinal: i for i, ordinal in enumerate(ordinals)}
    return Rank(
        rank=rank,
        clock=int(planes.get("Task Environment", {}).get("profile_start_time", 0)),
        host=host,
        devices=tuple(ordinals),
        platform=next((m[1].lower() for name in planes if (m := _DEVICE.match(name))), "cpu"),
        events=tuple(sorted((e._replace(device=place[e.device]) for e in events), key=_by_start)),
        work=tuple(sorted(work, key=_by_start)),
        notes=tuple(notes),
    )


def _by_start(event: Event | Work) -> tuple[int, int]:
    return event.start, -event.end


def _sort_lines(lines: Any) -> tuple[list[Event], list[Work]]:
    on_devices: list[Event] = []
    on_host: list[tuple[Event, int | None]] = []
    work: list[Work] = []
    ends: dict[int, int] = {}  # by number, on CPU
    for line in lines:
        device = _DEVICE.match(line.plane)
        for name, start, duration, stats in line.events:
            begin, end = round(start), round(start + duration)
            if "hlo_op" in stats and "hlo_module" in stats:
                ordinal = int(device[2]) if device else int(stats.get("device_ordinal", 0))
                event = _make_event(ordinal, name, begin, end, stats)
                if device:
                    on_devices.append(event)
                else:
                    on_host.append((event, stats.get("_p")))
            elif name.startswith("end: ") and "_c" in stats:
                ends[stats["_c"]] = begin
            elif not device and (what := _name_work(name)):
                work.append(Work(what, begin, end))
    if on_devices:  # then the host's events of an op are its launches
        return on_devices, work
    return [e._replace(latest=max(e.end, ends.get(n or 0, e.end))) for e, n in on_host], work


def _make_event(ordinal: int, name: str, begin: int, end: int, stats: dict[str, Any]) -> Event:
    in_graph = "cuda_graph_id" in stats
    run = int(stats.get("run_id", 0))
    return Event(
        *(ordinal, str(stats["hlo_module"]), str(stats["hlo_op"]), run, begin, end, end),
        name,
        in_graph,
    )


def _name_work(name: str) -> str:
    if _INPUT.search(name):
        return "input"
    return "host" if _HOST.search(name) else ""


def _scan_file(path: str | os.PathLike[str]) -> tuple[list[str], str]:
    """Return what the profiler says went wrong, and the host's name; check that the file is whole.

    jax's reader shows neither, and a file that was cut off between two planes would look complete.
    """
    notes, host = [], ""
    try:
        size = os.path.getsize(path)
        if not 0 < size <= MOST_BYTES:
            raise TraceError(
                f"a trace needs 1 to {MOST_BYTES} bytes, but {os.fspath(path)} has {size}: profile "
                "fewer steps"
            )
        for field, text in _list_fields(path, size):
            if field in (_ERRORS, _WARNINGS):
                word = "an error" if field == _ERRORS else "a warning"
                notes.append(f"the profiler reports {word}: {text[:200]}")
            elif field == _HOSTNAMES:
                host = text
    except OSError as error:
        raise TraceError(
            f"cannot read {os.fspath(path)}: {error.strerror or error}: name a folder of tx.profile"
        ) from None
    return notes, host


def _list_fields(path: str | os.PathLike[str], size: int) -> Iterator[tuple[int, str]]:
    """Yield number and text of each field of the outermost message but its planes."""
    with open_regular(path) as file:
        while file.tell() < size:
            field, kind = divmod(_read_varint(file, path), 8)
            if kind != 2:
                raise _refuse_bytes(path)
            length = _read_varint(file, path)
            if file.tell() + length > size:
                raise _refuse_bytes(path)
            if field == _PLANES:
                file.seek(length, os.SEEK_CUR)
            else:
                yield field, file.read(length).decode(errors="replace")


def _read_varint(file: Any, path: str | os.PathLike[str]) -> int:
    value = 0
    for shift in range(0, 64, 7):
        byte = file.read(1)
        if not byte:
            break
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    raise _refuse_bytes(path)


def _refuse_bytes(path: str | os.PathLike[str]) -> TraceError:
    return TraceError(
        f"{os.fspath(path)} is cut off, or no trace: it needs to be an .xplane.pb that "
        "jax.profiler or tx.profile has finished writing; profile again"
    )
