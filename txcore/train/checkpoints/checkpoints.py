"""Save and restore a run: its whole state and its position in the data, in a folder, by orbax."""

import itertools
import logging
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax

from txcore.kernels.common.checks import whole_number
from txcore.printing import format_call
from txcore.train.checkpoints import best, copies, folder, layers, manifest, saved_leaves
from txcore.train.checkpoints.manifest import CheckpointError, Metric, Position
from txcore.train.checkpoints.orbax_store import Store, Writing, import_orbax
from txcore.train.checkpoints.turns import Turns
from txcore.train.loggers import Metrics
from txcore.train.numerics import nonfinite
from txcore.train.state.state import TrainState

Resume = Literal["auto", "never", "must"]

_LOG = logging.getLogger("txcore")
_NUMBERS = itertools.count()  # numbers the `Checkpoints` of a process, alike on every process


class Checkpoints:
    """Keep a run's checkpoints in a folder, written while the run goes on.

    A checkpoint holds the whole state (parameters, optimizer, loss scale, `extra`, step, seed) and
    the position in the data. It is one folder, "step_00000100", that appears whole or not at all;
    its manifest has the SHA-256 of every file. It restores on any number of devices and processes
    that makes the same state and the same global batches. What each device keeps for
    itself (the residuals of a compression) is averaged for another number of devices.

    Args:
      directory: the folder, "~" for the home; several processes have to share it.
      every: steps from one checkpoint to the next.
      keep: how many of the newest to keep.
      keep_best: a metric that `evaluate` returns, and whether more or less of it is better, as in
        ("accuracy", "max"). The run is then also saved when an evaluation is the best so far, and
        the best checkpoint is kept beside the newest: `best` is its path.
      resume: "auto" resumes from the newest whole checkpoint, if there is one; "must" requires
        one; "never" requires that there is none.

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
        self.every, self.keep = _check_count("every", every), _check_count("keep", keep)
        self.keep_best = best.check_keep_best(keep_best)
        if resume not in ("auto", "never", "must"):
            raise ValueError(f"Checkpoints needs resume= 'auto', 'never' or 'must', got {resume!r}")
        if "://" in os.fspath(directory):
            raise ValueError(
                f"Checkpoints needs a folder of a file system, got {os.fspath(directory)!r}: mount "
                "the bucket and give the path where it lies"
            )
        self.directory = folder.absolute_path(directory)
        self.resume = resume
        name = f"checkpoints/{next(_NUMBERS)}"
        self._turns = Turns(name)
        self._store = Store(f"{name}/saves")
        self._refused: set[str] = set()  # names of the checkpoints that cannot be used
        self._failed: str | None = None  # why the last save failed
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
        """Return the newest whole checkpoint, in the layout of `state`.

        Args:
          state: of `engine.create_state`; the restored arrays get the shardings of its arrays.

        Returns:
          The state and the position of the checkpoint; without a checkpoint, `state` and the
          beginning, unless `resume` requires one.

        Raises:
          CheckpointError: there is none that can be used, it is of another model, precision or
            seed, or what is to be saved could not be: the folder cannot be written, another run is
            using it, orbax-checkpoint is missing, or an array is of a dtype that it does not store.
        """
        self.close()
        self._turns.run_on_all(partial(_check_can_save, state))
        self._take_folder()
        copied, stacked = copies.paths_of(state), layers.count_stacked_dims(state)
        own = saved_leaves.leaves_to_compare(
            saved_leaves.leaves_of(state), state.precision.compute, copied
        )
        refused: list[str] = []
        self._refused = set()
        for name in self._turns.run_on_first(lambda: folder.list_checkpoints(self.directory)):
            saved = self.directory / name
            problem, found = self._turns.run_on_first(
                partial(saved_leaves.examine_checkpoint, saved, own, copied, stacked)
            )
            if found is not None:
                restored = self._turns.run_on_all(partial(self._read_state, saved, state))
                if not nonfinite.has_nonfinite_parameter(restored):
                    self._log_info(f"resuming from {saved}, after {found['steps']} steps")
                    return restored, Position(**found)
                bad = self._turns.run_on_first(
                    partial(nonfinite.find_nonfinite_parameters, restored)
                )
                where = bad[0] if bad else "parameters of which rank 0 has no part"
                problem = f"{saved} holds values that are not finite, in {where}"
            refused.append(problem)
            self._refused.add(name)
            self._log_warning(f"{problem}; trying the one before")
        if refused or self.resume == "must":
            raise CheckpointError(self._describe_refused(refused), every_rank=True)
        return state, Position()

    @property
    def best(self) -> Path | None:
        """The best checkpoint by the metric of `keep_best`; None where there is none yet."""
        found = self._find_best()
        return self.directory / found[0] if found else None

    def improved_by(self, metrics: Metrics) -> bool:
        """Tell whether an evaluation is the best so far, alike on every process.

        Also true if it lacks the metric: `save` raises that error, once the state is safe.
        """
        return self.keep_best is not None and self._turns.run_on_first(
            partial(self._is_best, metrics)
        )

    def save(self, state: TrainState, position: Position, metrics: Metrics | None = None) -> None:
        """Start to write a checkpoint, and return once its arrays have been copied.

        Waits for the previous one to be whole. A checkpoint that cannot be written is logged, and
        the run goes on: the next one may succeed.

        Args:
          state: the state, not yet donated.
          position: where `fit` stands.
          metrics: of an evaluation of this state, if there was one, with the metric of `keep_best`.

        Raises:
          CheckpointError: the metric of `keep_best` is not among them; the state is saved.
        """
        self._finish_save()
        metric, lacks = best.try_find_metric(self.keep_best, metrics)
        to = self.directory / folder.checkpoint_name(position.steps)
        problem = self._store.start(Writing(to, position, metric), state)
        if problem is not None:
            self._note_failure(to, problem)
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
        self._finish_save()
        metric, lacks = best.try_find_metric(self.keep_best, metrics)
        saved = self.directory / folder.checkpoint_name(position.steps)
        if metric is not None and jax.process_index() == 0 and saved.exists():
            try:
                manifest.add_metric(saved, metric)
            except (CheckpointError, OSError) as error:
                self._log_warning(
                    f"the {metric.name} of {saved} was not noted: {folder.describe_error(error)}"
                )
            self._delete_old(saved.name)
        if lacks is not None:
            raise lacks

    def _is_best(self, metrics: Metrics) -> bool:
        metric, lacks = best.try_find_metric(self.keep_best, metrics)
        found = self._find_best()
        return lacks is not None or (
            metric is not None and (found is None or best.is_better(metric, found[1]))
        )

    def _find_best(self) -> tuple[str, Metric] | None:
        if self.keep_best is None:
            return None
        found = best.metrics_in(self.directory, reversed(self._usable_names()))
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
            self._finish_save()
        finally:
            if self._lock is not None:
                os.close(self._lock)
            self._lock = None
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise CheckpointError(f"{failed}. {self.describe_newest()}", every_rank=True)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            self._log_warning(str(failed))  # the error under way is raised instead

    def _take_folder(self) -> None:
        """Lock the folder for this run, and check that all processes share it."""

        def take_and_mark() -> str | None:
            if self._lock is None:
                self._lock = folder.take_folder(self.directory, fresh=self.resume == "never")
            return folder.make_mark(self.directory) if jax.process_count() > 1 else None

        marked = self._turns.run_on_first(take_and_mark)
        if marked is None:
            return
        try:
            self._turns.run_on_all(partial(folder.check_shared, self.directory, marked))
        finally:
            if jax.process_index() == 0:
                folder.delete_marks(self.directory)

    def _finish_save(self) -> None:
        """Wait for the checkpoint under way, and delete those beyond `keep`."""
        if self._store.writing is None:
            return
        to = self._store.writing.to
        try:
            problem = self._store.finish()
        except Exception as error:  # process 0 did not answer
            problem = folder.describe_error(error)
        if problem is not None:
            self._note_failure(to, problem)
            return
        self._failed = None
        self._refused.discard(to.name)
        self._delete_old(to.name)

    def _delete_old(self, newest: str) -> None:
        if jax.process_index() == 0:
            best_one = self._find_best()
            older = [name for name in self._usable_names() if name != newest]
            for name in older[self.keep - 1 :]:
                if best_one is not None and name == best_one[0]:
                    continue
                shutil.rmtree(self.directory / name, ignore_errors=True)

    def _note_failure(self, to: Path, reason: str) -> None:
        """Note and log why a save failed, with the same text on every process."""
        if jax.process_index() == 0:
            folder.delete_unfinished(self.directory, to.name)
        self._failed = f"{to} was not saved: {reason}"
        _LOG.warning("txcore: %s; the run goes on. %s", self._failed, self.describe_newest())

    def _usable_names(self) -> list[str]:
        names = folder.list_checkpoints(self.directory)
        return [name for name in names if name not in self._refused]

    def describe_newest(self) -> str:
        """Return a sentence, without its full stop, about the newest checkpoint."""
        names = self._usable_names()
        if not names:
            return "There is no checkpoint yet"
        return f"The newest checkpoint is {self.directory / names[0]}"

    def _read_state(self, saved: Path, state: TrainState) -> TrainState:
        try:
            return self._store.read(saved, state)
        except Exception as error:
            raise CheckpointError(
                f"{saved} cannot be read: {folder.describe_error(error)}. All processes need the "
                "folder on a file system that they share"
            ) from error

    def _describe_refused(self, refused: list[str]) -> str:
        if not refused:
            return f"resume='must' needs a checkpoint, and {self.directory} has none"
        return (
            f"none of the {len(refused)} checkpoints in {self.directory} can be used, the last "
            f"because {refused[-1]}. Nothing was deleted; to start anew, give another folder"
        )

    def _log_info(self, text: str) -> None:
        if jax.process_index() == 0:
            _LOG.info("txcore: %s", text)

    def _log_warning(self, text: str) -> None:
        if jax.process_index() == 0:
            _LOG.warning("txcore: %s", text)


def _check_can_save(state: TrainState) -> None:
    """Refuse a state that cannot be saved here."""
    import_orbax()
    saved_leaves.check_kinds(state)


def _check_count(name: str, value: Any) -> int:
    number = whole_number(value)
    if number is None or number < 1:
        raise ValueError(f"Checkpoints needs {name}= a count from 1 on, got {value!r}")
    return number
