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

from txcore.kernels.common.checks import whole_number
from txcore.launch.key_value import agree_on_problem, share
from txcore.printing import format_call
from txcore.train.checkpoints import best, folder, manifest, saved_leaves
from txcore.train.checkpoints.manifest import CheckpointError, Leaf, Metric, Position
from txcore.train.checkpoints.orbax_store import Store, Writing, orbax
from txcore.train.loggers import Metrics
from txcore.train.numerics import nonfinite
from txcore.train.state.state import TrainState

Resume = Literal["auto", "never", "must"]

_LOG = logging.getLogger("txcore")
_NUMBERS = itertools.count()  # of the Checkpoints of this process, the same on every process


class Checkpoints:
    """Keep a run's checkpoints in a folder, written while the run goes on.

    A checkpoint holds the whole state (parameters, optimizer, loss scale, `extra`, step, seed) and
    the position in the data. It is one folder, "step_00000100", that appears whole or not at all;
    its manifest has the SHA-256 of every file. It fits any number of devices and processes that
    makes the same state and the same global batches.

    Args:
      directory: the folder, "~" for the home; several processes have to share it.
      every: steps from one checkpoint to the next.
      keep: how many of the newest to keep.
      keep_best: a metric that `evaluate` returns, and whether more or less of it is better, as in
        ("accuracy", "max"). The run is then saved also where an evaluation is the best so far, and
        the best checkpoint is kept beside the newest: `best` is where it lies.
      resume: "auto" goes on from the newest that is whole, if there is one; "must" insists on
        one; "never" insists on none.

    Raises:
      ValueError: an argument is out of its range.

    Example:
      >>> import dataclasses, tempfile
      >>> folder = tempfile.mkdtemp()
      >>> engine = tx.Engine(mesh=tx.MeshSpec(jax.devices()[:2]), optimizer=tx.optim.sgd(0.1),
      ...                    plan=tx.Plan(data_parallel=tx.DP("data")))
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
        keep_best: best.KeepBest | None = None,
        resume: Resume = "auto",
    ) -> None:
        self.every, self.keep = _count("every", every), _count("keep", keep)
        self.keep_best = best.check(keep_best)
        if resume not in ("auto", "never", "must"):
            raise ValueError(f"Checkpoints needs resume= 'auto', 'never' or 'must', got {resume!r}")
        if "://" in os.fspath(directory):
            raise ValueError(
                f"Checkpoints needs a folder of a file system, got {os.fspath(directory)!r}: mount "
                "the bucket and give the path where it lies"
            )
        self.directory = folder.absolute(directory)
        self.resume = resume
        self._name = f"checkpoints/{next(_NUMBERS)}"
        self._turns = itertools.count()
        self._store = Store(f"{self._name}/saves")
        self._refused: set[str] = set()  # the names of those that cannot be used
        self._failed: str | None = None  # why the last save did not succeed
        self._lock: int | None = None

    def __repr__(self) -> str:
        return format_call(
            "Checkpoints",
            str(self.directory),
            every=(self.every, None),
            keep=(self.keep, 3),
            keep_best=(self.keep_best, None),
            resume=(self.resume, "auto"),
        )

    def restore(self, state: TrainState) -> tuple[TrainState, Position]:
        """Return the newest checkpoint that is whole, in the layout of `state`.

        Args:
          state: what `engine.create_state` returned; its arrays say where the restored ones lie.

        Returns:
          The state and the position of the checkpoint; `state` and the beginning, where there is
          none and none is asked for.

        Raises:
          CheckpointError: there is none that can be used, it is of another model, precision or
            seed, or what is to be saved could not be: the folder cannot be written, another run is
            using it, orbax-checkpoint is missing, or an array is of a dtype that it does not store.
        """
        self.close()
        self._each(partial(_check_kinds, state))
        self._take()
        own = saved_leaves.facts(saved_leaves.leaves_of(state), state.precision.compute)
        refused: list[str] = []
        self._refused = set()
        for name in self._together(lambda: folder.names(self.directory)):
            saved = self.directory / name
            problem, found = self._together(partial(_examine, saved, own))
            if found is not None:
                restored = self._each(partial(self._read, saved, state))
                if not nonfinite.holds_nonfinite(restored):
                    self._say(f"resuming from {saved}, after {found['steps']} steps")
                    return restored, Position(**found)
                bad = self._together(partial(nonfinite.bad_parameters, restored))
                where = bad[0] if bad else "parameters of which rank 0 has no part"
                problem = f"{saved} holds values that are not finite, in {where}"
            refused.append(problem)
            self._refused.add(name)
            self._warn(f"{problem}; trying the one before")
        if refused or self.resume == "must":
            raise CheckpointError(self._nothing_to_resume(refused), every_rank=True)
        return state, Position()

    @property
    def best(self) -> Path | None:
        """The best checkpoint by the metric of `keep_best`; None where there is none yet."""
        found = self._best()
        return self.directory / found[0] if found else None

    def improved_by(self, metrics: Metrics) -> bool:
        """Tell whether an evaluation is the best so far, alike on every process.

        True too where it lacks the metric: `save` says so, once the state is safe.
        """
        return self.keep_best is not None and self._together(partial(self._is_best, metrics))

    def save(self, state: TrainState, position: Position, metrics: Metrics | None = None) -> None:
        """Start to write a checkpoint, and return when the arrays have been copied.

        Waits for the one before to be whole. One that cannot be written is logged, and the run
        goes on: the next one, or `close`, may do better.

        Args:
          state: the state, not yet donated.
          position: where `fit` stands.
          metrics: of an evaluation of this state, if there was one; `keep_best` needs its metric.

        Raises:
          CheckpointError: the metric of `keep_best` is not among them; the state is saved.
        """
        self._finish()
        metric, lacks = self._measure(metrics)
        to = self.directory / folder.name(position.steps)
        problem = self._store.start(Writing(to, position, metric), state)
        if problem is not None:
            self._fail(to, problem)
        if lacks is not None:
            raise lacks

    def note(self, position: Position, metrics: Metrics) -> None:
        """Add the metric of `keep_best` to a checkpoint that was saved before it was evaluated.

        Args:
          position: where it was saved.
          metrics: of its evaluation.

        Raises:
          CheckpointError: the metric of `keep_best` is not among them.
        """
        if self.keep_best is None:
            return
        self._finish()
        metric, lacks = self._measure(metrics)
        saved = self.directory / folder.name(position.steps)
        if metric is not None and jax.process_index() == 0 and saved.exists():
            try:
                manifest.add_metric(saved, metric)
            except (CheckpointError, OSError) as error:
                self._warn(f"the {metric.name} of {saved} was not noted: {folder.reason(error)}")
            self._prune(saved.name)
        if lacks is not None:
            raise lacks

    def _measure(self, metrics: Metrics | None) -> tuple[Metric | None, CheckpointError | None]:
        if self.keep_best is None or metrics is None:
            return None, None
        try:
            return best.measure(self.keep_best, metrics), None
        except CheckpointError as lacks:
            return None, lacks

    def _is_best(self, metrics: Metrics) -> bool:
        metric, lacks = self._measure(metrics)
        found = self._best()
        return lacks is not None or (
            metric is not None and (found is None or best.is_better(metric, found[1]))
        )

    def _best(self) -> tuple[str, Metric] | None:
        if self.keep_best is None:
            return None
        found = best.metrics_in(self.directory, reversed(self._usable()))
        under_way = self._store.writing
        if under_way is not None and under_way.metric is not None:
            found.append((under_way.to.name, under_way.metric))
        return best.best_of(found, *self.keep_best)

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
            raise CheckpointError(f"{failed}. {self.newest()}", every_rank=True)

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
        """Take the folder for this run, and see that all processes have the same one."""

        def take() -> str | None:
            if self._lock is None:
                self._lock = folder.take(self.directory, fresh=self.resume == "never")
            return folder.mark(self.directory) if jax.process_count() > 1 else None

        marked = self._together(take)
        if marked is None:
            return
        try:
            self._each(partial(folder.check_shared, self.directory, marked))
        finally:
            if jax.process_index() == 0:
                folder.unmark(self.directory)

    def _finish(self) -> None:
        """Wait for the checkpoint that is under way, and delete those beyond `keep`."""
        if self._store.writing is None:
            return
        to = self._store.writing.to
        try:
            problem = self._store.finish()
        except Exception as error:  # process 0 was not heard of
            problem = folder.reason(error)
        if problem is not None:
            self._fail(to, problem)
            return
        self._failed = None
        self._refused.discard(to.name)
        self._prune(to.name)

    def _prune(self, newest: str) -> None:
        if jax.process_index() == 0:
            best_one = self._best()
            older = [name for name in self._usable() if name != newest]
            for name in older[self.keep - 1 :]:
                if best_one is not None and name == best_one[0]:
                    continue
                shutil.rmtree(self.directory / name, ignore_errors=True)

    def _fail(self, to: Path, reason: str) -> None:
        """Note why a save did not succeed; every process says so, in the same words."""
        if jax.process_index() == 0:
            folder.clear(self.directory, to.name)
        self._failed = f"{to} was not saved: {reason}"
        _LOG.warning("txcore: %s; the run goes on. %s", self._failed, self.newest())

    def _usable(self) -> list[str]:
        names = folder.names(self.directory)
        return [name for name in names if name not in self._refused]

    def newest(self) -> str:
        """Say which checkpoint is the newest, in a sentence without its full stop."""
        names = self._usable()
        if not names:
            return "There is no checkpoint yet"
        return f"The newest checkpoint is {self.directory / names[0]}"

    def _read(self, saved: Path, state: TrainState) -> TrainState:
        try:
            return self._store.read(saved, state)
        except Exception as error:
            raise CheckpointError(
                f"{saved} cannot be read: {folder.reason(error)}. All processes need the folder "
                "on a file system that they share"
            ) from error

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
        failed: Exception | None = None
        if jax.process_index() == 0:
            try:
                answer = {"result": function()}
            except Exception as error:  # the others must not wait for it
                failed, answer = error, {"error": _words(error)}
        text = share(f"{self._name}/{next(self._turns)}", json.dumps(answer))
        answer = json.loads(text)
        if "error" in answer:
            raise CheckpointError(answer["error"], every_rank=True) from failed
        return answer["result"]

    def _each(self, function: Callable[[], Any]) -> Any:
        """Return what this process's call returns; raise on every process where one's fails."""
        result, failed, problem = None, None, None
        try:
            result = function()
        except Exception as error:  # the others must not wait for this process
            failed, problem = error, _words(error)
        problem = agree_on_problem(f"{self._name}/{next(self._turns)}", problem)
        if problem is None:
            return result
        raise CheckpointError(problem, every_rank=True) from failed

    def _say(self, text: str) -> None:
        if jax.process_index() == 0:
            _LOG.info("txcore: %s", text)

    def _warn(self, text: str) -> None:
        if jax.process_index() == 0:
            _LOG.warning("txcore: %s", text)


def _check_kinds(state: TrainState) -> None:
    """Refuse what cannot be saved here."""
    orbax()
    saved_leaves.check_kinds(state)


def _words(error: Exception) -> str:
    """Return what the other processes are told of an error."""
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{type(error).__name__}: {folder.reason(error)}"


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


def _count(name: str, value: Any) -> int:
    number = whole_number(value)
    if number is None or number < 1:
        raise ValueError(f"Checkpoints needs {name}= a count from 1 on, got {value!r}")
    return number
