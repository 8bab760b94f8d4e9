"""Checkpoints of a run: everything that it is a function of, in a folder, by orbax."""

import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax

from txcore.launch.store import share
from txcore.train import checkpoint_folder as folder
from txcore.train import manifest, nonfinite, saved_leaves
from txcore.train.manifest import CheckpointError, Leaf, Position
from txcore.train.state import TrainState

Resume = Literal["auto", "never", "must"]

_LOG = logging.getLogger("txcore")
_ORBAX_TIMEOUT_S = 300  # for the other processes, where one cannot write
_NUMBERS = itertools.count()  # of the Checkpoints of this process, the same on every process


class Checkpoints:
    """Keep a run's checkpoints in a folder, written while the run goes on.

    A checkpoint holds the whole state (parameters, optimizer, loss scale, `extra`, step, seed) and
    the position in the data. It is one folder, "step_00000100", that appears whole or not at all;
    its manifest has the SHA-256 of every file. It fits any number of devices and processes that
    makes the same state and the same global batches.

    Args:
      directory: the folder; several processes have to share it.
      every: steps from one checkpoint to the next.
      keep: how many of the newest to keep.
      resume: "auto" goes on from the newest that is whole, if there is one; "must" insists on
        one; "never" insists on none.

    Raises:
      ValueError: an argument is out of its range.

    Example:
      >>> import dataclasses, tempfile
      >>> folder = tempfile.mkdtemp()
      >>> engine = tx.Engine(mesh=tx.MeshSpec(jax.devices()[:2]), plan=tx.Plan(tx.DP("data")),
      ...                    optimizer=tx.optim.sgd(0.1))
      >>> start = engine.create_state({"w": np.zeros(3, np.float32)})
      >>> with tx.Checkpoints(folder, every=100) as checkpoints:
      ...     state, position = checkpoints.restore(start)  # nothing there: what was given
      ...     checkpoints.save(state, dataclasses.replace(position, steps=100))
      >>> with tx.Checkpoints(folder, every=100, resume="must") as checkpoints:
      ...     checkpoints.restore(start)[1].steps
      100
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every: int,
        keep: int = 3,
        resume: Resume = "auto",
    ) -> None:
        for name, value in (("every", every), ("keep", keep)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Checkpoints needs {name}= a count from 1 on, got {value!r}")
        if resume not in ("auto", "never", "must"):
            raise ValueError(f"Checkpoints needs resume= 'auto', 'never' or 'must', got {resume!r}")
        if "://" in os.fspath(directory):
            raise ValueError(
                f"Checkpoints needs a folder of a file system, got {os.fspath(directory)!r}: mount "
                "the bucket and give the path where it lies"
            )
        self.directory = Path(directory).absolute()
        self.every, self.keep, self.resume = every, keep, resume
        self._name = f"checkpoints/{next(_NUMBERS)}"
        self._turns = itertools.count()
        self._writer: Any = None  # orbax's, made when first needed
        self._writing: tuple[Path, Position, tuple[Leaf, ...], str] | None = None
        self._refused: set[str] = set()  # the names of those that cannot be used
        self._failed: str | None = None  # why the last save did not succeed
        self._lock: int | None = None

    def restore(self, state: TrainState) -> tuple[TrainState, Position]:
        """Return the newest checkpoint that is whole, in the layout of `state`.

        Args:
          state: what `engine.create_state` returned; its arrays say where the restored ones lie.

        Returns:
          The state and the position of the checkpoint; `state` and the beginning, where there is
          none and none is asked for.

        Raises:
          CheckpointError: there is none that can be used, it is of another model, precision or
            seed, the folder cannot be written, or another run is using it.
        """
        self.close()
        self._together(self._take)
        own = saved_leaves.facts(saved_leaves.leaves_of(state), state.precision.compute)
        refused: list[str] = []
        self._refused = set()
        for name in self._together(lambda: folder.names(self.directory)):
            saved = self.directory / name
            problem, found = self._together(partial(_examine, saved, own))
            if found is not None:
                restored = self._read(saved, state)
                bad = self._together(partial(nonfinite.bad_parameters, restored))
                if not bad:
                    self._say(f"resuming from {saved}, after {found['steps']} steps")
                    return restored, Position(**found)
                problem = f"{saved} holds values that are not finite, in {bad[0]}"
            refused.append(problem)
            self._refused.add(name)
            self._warn(f"{problem}; trying the one before")
        if refused or self.resume == "must":
            raise CheckpointError(self._nothing_to_resume(refused))
        return state, Position()

    def save(self, state: TrainState, position: Position) -> None:
        """Start to write a checkpoint, and return when the arrays have been copied.

        Waits for the one before to be whole. One that cannot be written is logged, and the run
        goes on: the next one, or `close`, may do better.

        Args:
          state: the state, not yet donated.
          position: where `fit` stands.
        """
        self._finish()
        to = self.directory / folder.name(position.steps)
        need = sum(x.nbytes for x in jax.tree.leaves(state.arrays))
        problem = self._together(partial(folder.no_room, self.directory, need))
        if problem is not None:
            self._fail(to, problem)
            return
        self._writing = to, position, saved_leaves.leaves_of(state), state.precision.compute
        try:
            args = _orbax().args.StandardSave(saved_leaves.to_save(state))
            self._orbax().save(to, args=args, force=True)
        except Exception as error:
            self._writing = None
            self._fail(to, error)

    def close(self) -> None:
        """Wait until the last checkpoint is whole, and let other runs use the folder.

        Raises:
          CheckpointError: it could not be written.
        """
        try:
            self._finish()
        finally:
            if self._lock is not None:
                os.close(self._lock)
            self._lock = None
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise CheckpointError(f"{failed}. {self._newest()}")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            self._warn(str(failed))  # the error under way says more

    def _take(self) -> None:
        if self._lock is None:
            self._lock = folder.take(self.directory, fresh=self.resume == "never")

    def _finish(self) -> None:
        """Wait for the checkpoint that is under way, and delete those beyond `keep`."""
        if self._writing is None:
            return
        to = self._writing[0]
        try:
            self._orbax().wait_until_finished()
        except Exception as error:
            self._fail(to, error)
        else:
            self._failed = None
            self._refused.discard(to.name)
            self._prune(to.name)
        self._writing = None

    def _prune(self, newest: str) -> None:
        if jax.process_index() == 0:
            older = [name for name in self._usable() if name != newest]
            for name in older[self.keep - 1 :]:
                shutil.rmtree(self.directory / name, ignore_errors=True)

    def _fail(self, to: Path, why: Exception | str) -> None:
        """Note why a save did not succeed: an error of this process, or what all of them know."""
        if jax.process_index() == 0:
            folder.clear(self.directory, to.name)
        reason, by = why, ""
        if isinstance(why, Exception):
            reason = folder.reason(why)
            by = f" by rank {jax.process_index()}" if jax.process_count() > 1 else ""
        self._failed = f"{to} was not saved{by}: {reason}"
        if by or jax.process_index() == 0:
            _LOG.warning("txcore: %s; the run goes on. %s", self._failed, self._newest())

    def _usable(self) -> list[str]:
        names = folder.names(self.directory)
        return [name for name in names if name not in self._refused]

    def _newest(self) -> str:
        names = self._usable()
        if not names:
            return "There is no checkpoint yet"
        return f"The newest checkpoint is {self.directory / names[0]}"

    def _orbax(self) -> Any:
        if self._writer is None:
            ocp = _orbax()
            everyone = set(range(jax.process_count()))
            self._writer = ocp.AsyncCheckpointer(
                ocp.StandardCheckpointHandler(),
                async_options=ocp.AsyncOptions(
                    timeout_secs=_ORBAX_TIMEOUT_S, post_finalization_callback=self._complete
                ),
                # Named, the processes meet at the coordinator; else orbax runs a collective.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    active_processes=everyone, barrier_sync_key_prefix=self._name.replace("/", "-")
                ),
            )
        return self._writer

    def _complete(self) -> None:
        """Add the manifest to orbax's folder, just before it gets its name."""
        assert self._writing is not None
        to, position, leaves, precision = self._writing
        (unfinished,) = self.directory.glob(f"{to.name}{folder.UNFINISHED}")
        manifest.write(unfinished, position, leaves, precision, _versions())

    def _read(self, saved: Path, state: TrainState) -> TrainState:
        ocp = _orbax()
        try:
            there = manifest.read(saved).leaves
            wanted = saved_leaves.to_read(there, state)
            found = self._orbax().restore(saved, args=ocp.args.StandardRestore(wanted))
        except (CheckpointError, ValueError, OSError, KeyError) as error:
            raise CheckpointError(
                f"process {jax.process_index()} cannot read {saved}: {folder.reason(error)}. All "
                "processes need the folder on a file system that they share"
            ) from error
        return saved_leaves.filled(state, there, found)

    def _nothing_to_resume(self, refused: list[str]) -> str:
        if not refused:
            return f"resume='must' needs a checkpoint, and {self.directory} has none"
        return (
            f"none of the {len(refused)} checkpoints in {self.directory} can be used, the last "
            f"because {refused[-1]}. Nothing was deleted; to start anew, give another folder"
        )

    def _together(self, function: Callable[[], Any]) -> Any:
        """Return what process 0's call returns, on every process; or raise what it raises."""
        answer: dict[str, Any] = {}
        if jax.process_index() == 0:
            try:
                answer = {"result": function()}
            except CheckpointError as error:
                answer = {"error": str(error)}
        text = share(f"{self._name}/{next(self._turns)}", json.dumps(answer))
        answer = json.loads(text)
        if "error" in answer:
            raise CheckpointError(answer["error"])
        return answer["result"]

    def _say(self, text: str) -> None:
        if jax.process_index() == 0:
            _LOG.info("txcore: %s", text)

    def _warn(self, text: str) -> None:
        if jax.process_index() == 0:
            _LOG.warning("txcore: %s", text)


def _examine(saved: Path, own: tuple[Leaf, ...]) -> tuple[str | None, dict[str, Any] | None]:
    """Return (why a checkpoint cannot be used, None), or (None, its position).

    Raises:
      CheckpointError: it is whole, but of another model.
    """
    try:
        found = manifest.read(saved)
        manifest.verify(saved, found)
    except CheckpointError as error:
        return str(error), None
    if differs := manifest.difference(saved_leaves.facts(found.leaves, found.precision), own):
        raise CheckpointError(
            f"{saved} is of another model, optimizer, precision or seed: {differs}. Make the state "
            "that it was saved from, or give another folder"
        )
    return None, asdict(found.position)


def _orbax() -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise CheckpointError(
            "checkpoints need the package orbax-checkpoint: pip install 'txcore[examples]'"
        ) from None
    return ocp


def _versions() -> dict[str, str]:
    from importlib import metadata

    return {name: metadata.version(name) for name in ("txcore", "jax", "orbax-checkpoint")}
