"""`tx.profile`: record a trace of some steps, with the programs that ran."""

import contextlib
import os
import pathlib
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax

from txcore import _compat, step_events
from txcore.profiling.audit import audit_program, audit_text
from txcore.profiling.trace.folder import is_own_file, write_rank
from txcore.profiling.trace.programs import rows_of_report
from txcore.profiling.trace.read import read_events

_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?[\w.\-]+ = \(?\w+\[[^\]]*\]|^HloModule [^,\s]+", re.MULTILINE
)
_BOOT = "/proc/sys/kernel/random/boot_id"


@contextlib.contextmanager
def profile(
    folder: str | os.PathLike[str], *, steps: int | range | None = None
) -> Iterator["Recording"]:
    """Record a trace of training steps into a folder, for `txcore trace`.

    An engine's steps (`fit`, `run`) count by themselves; other loops put each of theirs into
    `with recording.step():`. Only what runs on the devices and the runtime's own work is recorded,
    no calls of Python. On GPU an engine compiles its steps anew without command buffers, in which
    collectives cannot be told apart. In several processes every one enters the block, with one
    folder for all or one each.

    Args:
      folder: new or empty, or one of an earlier profile of as many processes, which is replaced.
      steps: which of the steps in the block; a number n means n steps after the first one, which
        compiles. None records the whole block.

    Yields:
      The recording. Its files are complete when the block has ended, an exception too.

    Raises:
      ValueError: `steps` is no range of steps, the folder holds other files, or the block ended
        before the first of the steps.
      RuntimeError: a profile is active already.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with tx.profile(folder, steps=range(2)) as recording:
      ...         for _ in range(3):
      ...             with recording.step():
      ...                 y = jax.jit(jnp.sin)(jnp.ones(3))
      ...     sorted(os.listdir(folder))[-1], recording.recorded
      ('rank0.xplane.pb', 2)
    """
    recording = Recording(folder, steps)
    if step_events.listener is not None:
        raise RuntimeError(
            "tx.profile records one trace at a time, but a profile is active: leave its block first"
        )
    step_events.listener = recording
    failed = True
    try:
        if recording.wanted is None:
            recording.start()
        yield recording
        failed = False
    finally:
        step_events.listener = None
        recording.stop()
    if not failed and not recording.recorded and recording.wanted is not None:
        raise ValueError(
            f"tx.profile needs more than {recording.wanted.start} steps in its block for "
            f"steps={steps!r}, but it ran {recording.count}: give earlier steps, or run more"
        )


class Recording:
    """A profile while its block runs.

    Attributes:
      wanted: the steps to record; None for all.
      count: the steps that have begun.
      recorded: how many of them were recorded.
    """

    def __init__(self, folder: str | os.PathLike[str], steps: int | range | None):
        self.wanted = _check_steps(steps)
        self.count = self.recorded = 0
        self._folder = pathlib.Path(folder).resolve()
        _check_folder(self._folder)
        self._draft: str | None = None  # where jax writes, while it records
        self._programs: dict[int, Any] = {}

    @contextlib.contextmanager
    def step(self, program: Any = None) -> Iterator[None]:
        """Mark a step of a loop: what its block dispatches.

        Args:
          program: the engine's program that it runs, if it is an engine's.
        """
        number, wanted = self.count, self.wanted
        if wanted is not None and wanted and number == wanted[0]:
            self.start()
        self.count += 1
        with jax.profiler.StepTraceAnnotation("txcore.step", step_num=number):
            yield
        if self._draft is not None:
            self.recorded += 1
            if program is not None:
                self._programs[id(program)] = program
            if wanted is not None and number >= wanted[-1]:
                self.stop()

    def input(self) -> contextlib.AbstractContextManager[None]:
        """Mark the time that a loop waits for its next batch."""
        annotation: contextlib.AbstractContextManager[None] = jax.profiler.TraceAnnotation(
            "txcore.input"
        )
        return annotation

    def compiler_options(self, platform: str) -> dict[str, Any]:
        """Return what an engine's steps are compiled with while this is active."""
        return {"xla_gpu_enable_command_buffer": ""} if platform in ("gpu", "cuda") else {}

    def start(self) -> None:
        """Begin to record, once the devices have done what came before."""
        _wait_for_devices()
        self._folder.mkdir(parents=True, exist_ok=True)
        draft = tempfile.mkdtemp(dir=self._folder, prefix=".draft-")
        try:
            jax.profiler.start_trace(draft, profiler_options=_compat.profile_options())
        except BaseException:  # another profile of jax's is active: it is not ours to stop
            shutil.rmtree(draft, ignore_errors=True)
            raise
        self._draft = draft

    def stop(self) -> None:
        """End the trace, if it is being recorded, and write its files."""
        if self._draft is None:
            return
        draft, self._draft = self._draft, None
        try:
            _wait_for_devices()
            jax.profiler.stop_trace()
            self._keep_trace(pathlib.Path(draft))
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _keep_trace(self, draft: pathlib.Path) -> None:
        rank = jax.process_index()
        _remove_rank(self._folder, rank)
        written = sorted(draft.rglob("*.xplane.pb"))
        if not written:
            raise RuntimeError(
                "jax's profiler wrote no .xplane.pb: another trace of this process was stopped by "
                "someone else; use one profiler at a time"
            )
        target = self._folder / f"rank{rank}.xplane.pb"
        os.replace(written[-1], target)
        names = {event.module for event in read_events(target).events}
        about = {
            "rank": rank,
            "processes": jax.process_count(),
            "host": _name_host(),
            "devices": [device.id for device in jax.local_devices()],
            "asked_steps": 0 if self.wanted is None else len(self.wanted),
            "recorded_steps": self.recorded,
        }
        write_rank(self._folder, about, self._describe_programs(names))

    def _describe_programs(self, names: set[str]) -> Iterator[tuple[str, Any, bool, list[int]]]:
        """Yield text, collectives, whether checked, and devices of the programs that ran."""
        known = set()
        for program in self._programs.values():
            text = program.compiled.as_text() or ""
            report = audit_program(program)
            known.add(_outline(text))
            yield text, rows_of_report(report.collectives), report.checked, _mesh_devices(program)
        for _, text in _compat.live_programs(names):
            if (outline := _outline(text)) not in known:
                known.add(outline)
                yield text, rows_of_report(audit_text(text).collectives), False, []


def _wait_for_devices() -> None:
    """Wait for all that was dispatched: no array that is alive is left to come."""
    for array in jax.live_arrays():
        # A donated array may be listed, and a step that failed before is not this trace's to tell.
        with contextlib.suppress(Exception):
            array.block_until_ready()


def _check_steps(steps: int | range | None) -> range | None:
    if steps is None:
        return None
    if type(steps) is int and steps > 0:
        return range(1, 1 + steps)
    if isinstance(steps, range) and len(steps) and steps.step == 1 and steps.start >= 0:
        return steps
    raise ValueError(
        f"tx.profile needs a number of steps or a range of consecutive ones as steps=, got "
        f"{steps!r}: write steps=5 or steps=range(10, 15)"
    )


def _check_folder(folder: pathlib.Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"tx.profile needs a folder, but {folder} is a file: name another")
    others = [each.name for each in folder.iterdir()] if folder.exists() else []
    foreign = [name for name in others if not (is_own_file(name) or name.startswith(".draft-"))]
    if foreign:
        raise ValueError(
            "tx.profile needs a new or empty folder, or one of an earlier profile, but "
            f"{folder} holds {sorted(foreign)[0]}: name another"
        )


def _remove_rank(folder: pathlib.Path, rank: int) -> None:
    """Remove an earlier profile's files of this rank, and those of ranks that this run lacks."""
    for file in folder.iterdir():
        if is_own_file(file.name):
            owner = int(file.name[4:].partition(".")[0])
            if owner == rank or owner >= jax.process_count():
                file.unlink(missing_ok=True)


def _name_host() -> str:
    """Name the machine, and its boot: processes of one boot share a clock."""
    try:
        with open(_BOOT, encoding="ascii") as file:
            return f"{platform.node()} {file.read(64).strip()}"
    except OSError:
        return platform.node()


def _outline(hlo: str) -> tuple[str, ...]:
    """Return names and types of a module's instructions: its backend_configs print in any order."""
    return tuple(_INSTRUCTION.findall(hlo))


def _mesh_devices(program: Any) -> list[int]:
    shardings = jax.tree.leaves(program.compiled.input_shardings)
    named = [s for s in shardings if isinstance(s, jax.sharding.NamedSharding)]
    return [int(device.id) for device in named[0].mesh.devices.flat] if named else []
