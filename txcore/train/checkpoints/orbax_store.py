"""Write a state's arrays into a folder with orbax while the run goes on, and read them."""

import asyncio
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from txcore.launch.key_value import agree_on_problem
from txcore.train.checkpoints import folder, manifest, saved_leaves
from txcore.train.checkpoints.manifest import CheckpointError, Leaf, Metric, Position
from txcore.train.state.state import TrainState

# For the manifest: a state's leaves and precision, and of what made it the versions and the proof.
Facts = tuple[tuple[Leaf, ...], str, dict[str, str]]

WRITE_S = 300.0  # that process 0 waits for the others to write their parts


@dataclass(frozen=True)
class Writing:
    """Hold the checkpoint that is being written."""

    to: Path
    position: Position
    metric: Metric | None


class Store:
    """Write one checkpoint at a time into a folder, and read any.

    Process 0 makes the folder, every process writes its part, and process 0 renames the folder. The
    processes agree after the first two steps, so that none waits for one that has failed. Orbax's
    checkpointer is not used, since its own barriers would wait.

    Args:
      name: the same on every process, and different for each store.
    """

    def __init__(self, name: str) -> None:
        self._name, self._turns = name, itertools.count()
        self._handler: Any = None  # orbax's handler, made when first needed
        self._ended: Future[str | None] = Future()
        self.writing: Writing | None = None

    def start(self, writing: Writing, state: TrainState) -> str | None:
        """Copy a state's arrays, and start to write them; `finish` returns the outcome.

        Returns:
          Why nothing is written, on every process alike; None if writing has started.
        """
        turn = f"{self._name}/{next(self._turns)}"
        facts, problem = try_call(partial(_prepare_save, writing, state))
        problem = agree_on_problem(f"{turn}/prepare", problem)
        if problem is not None:
            return problem
        self.writing, self._ended = writing, Future()
        copied = threading.Event()
        write = partial(self._write_part, writing, state, copied)
        run = partial(
            self._write_and_agree, turn, write, partial(self._commit_save, writing, facts)
        )
        try:
            # In a new thread, since orbax needs a thread without a running event loop.
            threading.Thread(
                target=_resolve_future, args=(self._ended, run), name="txcore save"
            ).start()
            copied.wait()
        except RuntimeError as error:  # no thread can be started
            _resolve_future(
                self._ended, partial(agree_on_problem, turn, str(error), timeout_s=WRITE_S)
            )
        return None

    def finish(self) -> str | None:
        """Wait until the checkpoint is whole; return why it is not, on every process alike."""
        try:
            return self._ended.result()
        finally:
            self.writing = None

    def read(self, saved: Path, state: TrainState) -> TrainState:
        """Return the checkpoint's arrays in the layout of `state`."""
        there = manifest.read_manifest(saved).leaves
        args = import_orbax().args.StandardRestore(saved_leaves.shapes_to_read(there, state))
        found = self._get_handler().restore(_as_epath(saved), args=args)
        return saved_leaves.fill_state(state, there, found)

    def _get_handler(self) -> Any:
        if self._handler is None:
            self._handler = import_orbax().StandardCheckpointHandler()
        return self._handler

    def _write_and_agree(
        self, turn: str, write: Callable[[], None], commit: Callable[[], None]
    ) -> str | None:
        """Write this process's part, and agree with the others on how it went."""
        _, problem = try_call(write)
        return agree_on_problem(turn, problem, lambda: try_call(commit)[1], timeout_s=WRITE_S)

    def _write_part(self, writing: Writing, state: TrainState, copied: threading.Event) -> None:
        try:
            folder.check_made(writing.to)
            args = import_orbax().args.StandardSave(saved_leaves.arrays_to_save(state))
            to = _as_epath(folder.unfinished_path(writing.to))
            parts = asyncio.run(self._get_handler().async_save(to, args=args)) or []
        finally:
            copied.set()  # the state may be donated from now on
        problems = [try_call(part.result)[1] for part in parts]  # waits for each
        if failed := [problem for problem in problems if problem is not None]:
            raise RuntimeError(failed[0])

    def _commit_save(self, writing: Writing, facts: Facts) -> None:
        """Merge the parts of all processes, add the manifest, and rename the folder."""
        unfinished = folder.unfinished_path(writing.to)
        self._get_handler().finalize(_as_epath(unfinished))
        manifest.write_manifest(unfinished, writing.position, *facts, writing.metric)
        folder.commit_finished(writing.to)


def _prepare_save(writing: Writing, state: TrainState) -> Facts:
    need = sum(x.nbytes for x in jax.tree.leaves(state.arrays))
    if (problem := folder.describe_shortage(writing.to.parent, need)) is not None:
        raise CheckpointError(problem)
    if jax.process_index() == 0:
        folder.make_unfinished(writing.to)
    versions, proof = _find_versions(), getattr(state.owner.engine, "proof", "")
    if proof:
        versions["proof"] = proof
    return saved_leaves.leaves_of(state), state.precision.compute, versions


def _resolve_future(ended: "Future[str | None]", run: Callable[[], str | None]) -> None:
    try:
        ended.set_result(run())
    except BaseException as error:
        ended.set_exception(error)


def try_call(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """Call a function; return (result, None), or (None, its error in one line)."""
    try:
        return function(), None
    except Exception as error:
        return None, folder.describe_error(error)


def _as_epath(path: Path) -> Any:
    from etils import epath  # orbax's own dependency: its handlers need these paths

    return epath.Path(path)


def read_arrays(saved: Path, numbers: list[str]) -> dict[str, Any]:
    """Read some of a checkpoint's arrays into host memory, without the other processes."""
    ocp = import_orbax()
    item = dict.fromkeys(numbers, 0)
    kinds = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in numbers}
    args = ocp.args.PyTreeRestore(item=item, restore_args=kinds, partial_restore=True)
    return ocp.PyTreeCheckpointHandler().restore(saved, args=args)


def import_orbax() -> Any:
    """Import orbax.checkpoint when it is first needed.

    Raises:
      CheckpointError: it is not installed.
    """
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise CheckpointError(
            "checkpoints need the package orbax-checkpoint: pip install 'txcore[checkpoints]'"
        ) from None
    return ocp


def _find_versions() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in ("txcore", "jax", "orbax-checkpoint"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # used from a folder, without being installed
            found[name] = "unknown"
    return found
