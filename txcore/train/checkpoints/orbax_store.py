"""A state's arrays in a folder, by orbax: written while the run goes on, and read."""

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

Facts = tuple[tuple[Leaf, ...], str]  # what the manifest holds of a state: leaves and precision

WRITE_S = 300.0  # that process 0, having written its part, waits for the others to write theirs


@dataclass(frozen=True)
class Writing:
    """Hold which checkpoint is under way."""

    to: Path
    position: Position
    metric: Metric | None


class Store:
    """Write one checkpoint at a time into a folder, and read any.

    Every process writes its part; process 0 makes the folder before and names it after. All agree
    at both, so that a process that fails keeps none waiting: prepare, all well? write, all well?
    commit. Orbax's checkpointer, which has barriers of its own between these, is not used.

    Args:
      name: the same on every process, and another one for each store.
    """

    def __init__(self, name: str) -> None:
        self._name, self._turns = name, itertools.count()
        self._handler: Any = None  # orbax's, made when first needed
        self._ended: Future[str | None] = Future()
        self.writing: Writing | None = None

    def start(self, writing: Writing, state: TrainState) -> str | None:
        """Copy a state's arrays, and start to write them; `finish` tells how that ended.

        Returns:
          Why nothing is written, on every process alike; None where something is.
        """
        turn = f"{self._name}/{next(self._turns)}"
        facts, problem = attempt(partial(_prepare, writing, state))
        problem = agree_on_problem(f"{turn}/prepare", problem)
        if problem is not None:
            return problem
        self.writing, self._ended = writing, Future()
        copied = threading.Event()
        write = partial(self._write, writing, state, copied)
        run = partial(self._end, turn, write, partial(self._commit, writing, facts))
        try:
            # A thread of its own has no event loop, and orbax wants one.
            threading.Thread(target=_resolve, args=(self._ended, run), name="txcore save").start()
            copied.wait()
        except RuntimeError as error:  # no thread can be started
            _resolve(self._ended, partial(agree_on_problem, turn, str(error), timeout_s=WRITE_S))
        return None

    def finish(self) -> str | None:
        """Wait until what is under way is whole; return why it is not, on every process alike."""
        try:
            return self._ended.result()
        finally:
            self.writing = None

    def read(self, saved: Path, state: TrainState) -> TrainState:
        """Return the checkpoint's arrays in the layout of `state`."""
        there = manifest.read(saved).leaves
        args = orbax().args.StandardRestore(saved_leaves.to_read(there, state))
        found = self._orbax().restore(_path(saved), args=args)
        return saved_leaves.filled(state, there, found)

    def _orbax(self) -> Any:
        if self._handler is None:
            self._handler = orbax().StandardCheckpointHandler()
        return self._handler

    def _end(self, turn: str, write: Callable[[], None], commit: Callable[[], None]) -> str | None:
        """Write this process's part, and agree with the others on how it went."""
        _, problem = attempt(write)
        return agree_on_problem(turn, problem, lambda: attempt(commit)[1], timeout_s=WRITE_S)

    def _write(self, writing: Writing, state: TrainState, copied: threading.Event) -> None:
        try:
            folder.check_made(writing.to)
            args = orbax().args.StandardSave(saved_leaves.to_save(state))
            to = _path(folder.unfinished(writing.to))
            parts = asyncio.run(self._orbax().async_save(to, args=args)) or []
        finally:
            copied.set()  # the state may be used up from now on
        problems = [attempt(part.result)[1] for part in parts]  # waits for each
        if failed := [problem for problem in problems if problem is not None]:
            raise RuntimeError(failed[0])

    def _commit(self, writing: Writing, facts: Facts) -> None:
        """Make the checkpoint whole: merge what all wrote, add the manifest, and name it."""
        unfinished = folder.unfinished(writing.to)
        self._orbax().finalize(_path(unfinished))
        manifest.write(unfinished, writing.position, *facts, _versions(), writing.metric)
        folder.commit(writing.to)


def _prepare(writing: Writing, state: TrainState) -> Facts:
    need = sum(x.nbytes for x in jax.tree.leaves(state.arrays))
    if (problem := folder.no_room(writing.to.parent, need)) is not None:
        raise CheckpointError(problem)
    if jax.process_index() == 0:
        folder.make(writing.to)
    return saved_leaves.leaves_of(state), state.precision.compute


def _resolve(ended: "Future[str | None]", run: Callable[[], str | None]) -> None:
    try:
        ended.set_result(run())
    except BaseException as error:
        ended.set_exception(error)


def attempt(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return a function's result, or None and what it fails by, in words on one line."""
    try:
        return function(), None
    except Exception as error:
        return None, folder.reason(error)


def _path(path: Path) -> Any:
    from etils import epath  # orbax's own dependency, whose paths its handlers want

    return epath.Path(path)


def read_arrays(saved: Path, numbers: list[str]) -> dict[str, Any]:
    """Return some of a checkpoint's arrays on the host, without any other process."""
    ocp = orbax()
    item = dict.fromkeys(numbers, 0)
    kinds = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in numbers}
    args = ocp.args.PyTreeRestore(item=item, restore_args=kinds, partial_restore=True)
    return ocp.PyTreeCheckpointHandler().restore(saved, args=args)


def orbax() -> Any:
    """Return orbax.checkpoint, which is imported where it is first needed.

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


def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in ("txcore", "jax", "orbax-checkpoint"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # used from a folder, without being installed
            found[name] = "unknown"
    return found
