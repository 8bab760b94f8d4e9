"""The training loop: feed batches to a step, keep the devices busy, tell the loggers, save."""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from txcore.kernels.common.checks import whole_number
from txcore.launch import watch
from txcore.train.batch import examples, shard_batch
from txcore.train.checkpoints import folder
from txcore.train.checkpoints.checkpoints import Checkpoints
from txcore.train.checkpoints.manifest import CheckpointError, Position
from txcore.train.compile import name_of
from txcore.train.error_state import give_state, is_alive
from txcore.train.interrupt import Interrupt, interrupts
from txcore.train.loggers import Metrics
from txcore.train.numerics import nonfinite
from txcore.train.progress import Progress, real_examples, to_host
from txcore.train.replicas import agreement
from txcore.train.state import TrainState
from txcore.train.step_fn import StepFn

if TYPE_CHECKING:
    from txcore.train.engine import Engine

Data = Iterable[Any] | Callable[[int], Iterable[Any]]
Evaluate = Callable[[TrainState], Metrics]

_LOG = logging.getLogger("txcore")


def fit(
    engine: "Engine",
    step: StepFn,
    state: TrainState,
    data: Data,
    *,
    steps: int | None,
    epochs: int | None,
    evaluate: Evaluate | None,
    eval_every: int | None,
    checkpoints: Checkpoints | None,
    check_replicas_every: int | None = None,
) -> TrainState:
    """Train as `Engine.fit` says."""
    run = Run(engine, state, evaluate, checkpoints)
    with interrupts() as interrupt:  # until the last save is whole
        try:
            if jax.process_count() > 1:
                watch.start()  # where tx.initialize did not
            length = Length.of(steps, epochs)
            run.eval_every = check_evaluation(evaluate, eval_every, checkpoints)
            run.compare_every = check_count("check_replicas_every", check_replicas_every)
            engine.check_state(state, "fit")
            state.known_equal.clear()  # compared before the first step, whatever was done to it
            if engine.spans:
                agreement.check_fit(
                    engine,
                    data,
                    steps=length.steps,
                    epochs=length.epochs,
                    evaluate=evaluate,
                    eval_every=run.eval_every,
                    checkpoints=checkpoints,
                    check_replicas_every=run.compare_every,
                )
            return train(run, step, data, length, interrupt)
        except BaseException as error:
            interrupt.hold()  # it ends already
            newest = checkpoints.newest() if isinstance(checkpoints, Checkpoints) else None
            give_state(error, run.state, newest)
            raise


def train(
    run: "Run", step: StepFn, data: Data, length: "Length", interrupt: Interrupt
) -> TrainState:
    """Make the steps of a run, and end it as a signal asks for, if one came."""
    begun = False
    try:
        with run.checkpoints or nullcontext():
            run.begin(data, length)
            begun = True
            if run.compare_every:
                run.compare_copies()
            for after, host in batches(data, length, run.position, run.rows):
                if interrupt.due(run.position.steps):
                    break
                run.make(step, host, after, interrupt)
                if run.is_due(run.eval_every):
                    run.evaluate_once()
                if run.is_to_be_saved():
                    run.save_once()
                if run.is_due(run.compare_every):
                    run.compare_copies()
                watch.at("data", run.position.steps)
            run.wait()
            if interrupt.stopped is None:
                run.evaluate_once()
            run.save_once()
            run.compare_ends()
    except BaseException as error:
        # Once the checkpoint under way is whole, and the steps that are: the others, which end
        # when they are told, have to be there for both.
        is_alive(run.state)
        # Of what all ranks find alike none is told: they may go on, as after a MismatchError.
        if begun and not (isinstance(error, FloatingPointError) and run.fails_alike(error)):
            watch.failed(error)
        raise
    if interrupt.stopped is None and not interrupt.due(run.position.steps):
        interrupt.stopped = interrupt.asked  # too late for the others to stop with this process
    watch.at("after fit", run.position.steps)
    if interrupt.stopped is not None:
        run.tell_stopped(watch.stop_reason() or interrupt.stopped.name)
        interrupt.end()
    run.progress.tell("end", {})
    return run.state


@dataclass
class Run:
    """Hold what changes while `fit` runs, and do what it does between two batches."""

    engine: "Engine"
    state: TrainState
    evaluate: Evaluate | None
    checkpoints: Checkpoints | None
    eval_every: int | None = None
    compare_every: int | None = None
    evaluates: bool = False  # just now

    def begin(self, data: Data, length: "Length") -> None:
        """Go on from the newest checkpoint, or from where the state is."""
        given, made = self.state, steps_made(self.state)
        self.position = Position(steps=made)
        if self.checkpoints is not None:
            self.state, found = self.checkpoints.restore(given)
            self.position = found if self.state is not given else self.position
        total = length.total(data, self.position)
        if self.checkpoints is not None and self.state is not given:
            check_length(self.checkpoints, self.position, total)
            if self.position.steps < made:
                told = "the checkpoint is after %d steps, and the state given to fit after %d: "
                _warn(told + "it goes on from the checkpoint", self.position.steps, made)
        elif total is not None and made:
            check_rest(made, total)
        self.progress = Progress(self.engine, total, self.position, self._check)
        self.evaluated, self.saved = 0, self.position.steps  # after so many steps
        self.metrics: Metrics = {}  # of the last evaluation
        self.equal: int | None = None  # after so many steps all copies were

    def _check(self, done: int, metrics: Metrics) -> None:
        nonfinite.check(done, metrics, self.state, self.engine.on_nonfinite)

    def rows(self, host: Any) -> int:
        """Return how many rows the global batch has of which `host` is this process's part."""
        return examples(host, self.engine.plan)[0] * jax.process_count()

    def make(self, step: StepFn, host: Any, after: Position, interrupt: Interrupt) -> None:
        """Start a step; wait for an older one if too many are under way."""
        engine = self.engine
        batch = shard_batch(host, engine.mesh, engine.plan)
        if engine.spans and self.equal is not None and self.equal == self.position.steps:
            agreement.check_batch(batch, engine.mesh.mesh, name_of(step))  # as the copies were
        self.progress.start_clock()
        watch.at("step", self.position.steps, engine.last_words)
        if engine.spans:
            watch.meet(f"batch {after.batch} of epoch {after.epoch}, step {after.steps} of fit")
        interrupt.hold()
        try:
            self.state, metrics = engine.run(step, self.state, batch)
        finally:
            interrupt.release()
        self.position = after
        self.progress.add(metrics, real_examples(host, batch, engine.plan))

    def wait(self) -> None:
        """Wait for the steps that are under way."""
        watch.at("step", self.position.steps, self.engine.last_words)
        self.progress.stop_clock()

    def evaluate_once(self) -> None:
        """Evaluate the state, unless there is nothing to do or it was done."""
        if self.evaluate is None or self.evaluated == self.position.steps:
            return
        self.wait()
        self.evaluates = True
        self.metrics = to_host(self.evaluate(self.state))
        self.evaluates = False
        self.progress.tell("eval", self.metrics)
        self.evaluated = self.position.steps

    def fails_alike(self, error: BaseException) -> bool:
        """Tell whether all ranks find a loss or a parameter, or an evaluation, not finite.

        Losses and parameters are equal on all ranks; of what an evaluation raises that is asked.
        """
        if self.evaluates and self.engine.spans:
            return agreement.fails_alike(error, self.position.steps)
        return True

    def is_due(self, every: int | None) -> bool:
        """Tell whether what is done every so many steps is to be done now."""
        return every is not None and self.position.steps % every == 0

    def is_to_be_saved(self) -> bool:
        """Tell whether a checkpoint is due, or the state has just been found to be the best."""
        if self.checkpoints is None:
            return False
        if self.is_due(self.checkpoints.every):
            return True
        return self.evaluated == self.position.steps and self.checkpoints.improved_by(self.metrics)

    def save_once(self) -> None:
        """Start to write a checkpoint, unless there is nowhere to or it was done."""
        if self.checkpoints is None:
            return
        metrics = self.metrics if self.evaluated == self.position.steps else None
        if self.saved == self.position.steps:
            if metrics is not None and self.saved:
                self.checkpoints.note(self.position, metrics)
            return
        self.wait()
        nonfinite.check_parameters(self.position.steps, self.state, self.engine.on_nonfinite)
        watch.at("save", self.position.steps)
        if self.engine.spans:
            watch.meet(f"a checkpoint after {self.position.steps} steps")
        self.saved = self.position.steps
        self.checkpoints.save(self.state, self.progress.position(self.position), metrics)

    def compare_copies(self) -> None:
        """Refuse to go on where copies that have to be equal differ."""
        self.wait()
        steps = self.position.steps
        self.engine.check_replicas(self.state, after=steps, since=self.equal)
        self.equal = steps

    def compare_ends(self) -> None:
        """Refuse a loop that ended elsewhere on another rank."""
        if self.engine.spans:
            watch.meet(f"the end of fit, after {self.position.steps} steps")
            watch.at("comparison", self.position.steps, "the end of fit")
            agreement.check_end(self.position)

    def tell_stopped(self, name: str) -> None:
        """Say by which signal the run stopped, and what is left of it."""
        kept = "; nothing is saved without checkpoints= (the exception has the state)"
        kept = ", all saved" if self.checkpoints else kept
        _warn("%s: stopped after %d steps%s", name, self.position.steps, kept)


def _warn(text: str, *values: Any) -> None:
    if jax.process_index() == 0:
        _LOG.warning("txcore: " + text, *values)


@dataclass(frozen=True)
class Length:
    """Hold how long a run is to be: steps, those before this call among them, or epochs."""

    steps: int | None
    epochs: int | None

    @classmethod
    def of(cls, steps: Any, epochs: Any) -> "Length":
        """Return the length that `fit` was given, or refuse it."""
        if (steps is None) == (epochs is None):
            raise ValueError(f"fit needs one of steps= and epochs=, got {steps=} and {epochs=}")
        given = steps if steps is not None else epochs
        number = whole_number(given)
        if number is None or number < 0:
            raise ValueError(f"fit needs steps= or epochs= a count from 0 on, got {given!r}")
        return cls(number, None) if steps is not None else cls(None, number)

    def total(self, data: Data, at: Position) -> int | None:
        """Return the number of steps, from a position in the data on, if it is known."""
        if self.epochs is None:
            return self.steps
        number = agreement.count_batches(data)
        if number is None:
            return None
        return at.steps - at.batch + (self.epochs - at.epoch) * number


def check_evaluation(
    evaluate: Evaluate | None, eval_every: Any, checkpoints: Checkpoints | None
) -> int | None:
    """Return `eval_every`, or refuse it and what does not go with it."""
    every = whole_number(eval_every)
    if eval_every is not None and (every is None or every < 1 or evaluate is None):
        raise ValueError(
            f"fit needs eval_every= at least 1 and evaluate= with it, got {eval_every=}"
        )
    if checkpoints is not None and not isinstance(checkpoints, Checkpoints):
        raise TypeError(
            f"fit needs checkpoints= a tx.Checkpoints(folder, every=...), got {checkpoints!r}"
        )
    if checkpoints is not None and checkpoints.keep_best and evaluate is None:
        raise ValueError(
            f"fit needs evaluate= for Checkpoints(keep_best={checkpoints.keep_best}), got none: "
            "give a function that returns that metric"
        )
    return every


def steps_made(state: TrainState) -> int:
    """Return how many steps a state has made, those that a loss scale skipped too."""
    skipped = 0 if state.loss_scaling is None else int(np.asarray(state.loss_scaling.skipped_steps))
    return int(np.asarray(state.step)) + skipped


def check_rest(made: int, total: int) -> None:
    """Refuse to go on from a state that has made more steps than the run is to."""
    more = f"give steps={made + total} for {total} more"
    if made > total:
        raise ValueError(
            f"fit is to make steps={total} in all, and the state has made {made} already: {more}"
        )
    if made == total:
        _warn("fit has no step to make: of steps=%d the state has made all: %s", total, more)


def check_count(option: str, value: Any) -> int | None:
    """Return a count of steps, None for none, or refuse what is no count."""
    number = whole_number(value)
    if value is not None and (number is None or number < 1):
        raise ValueError(f"fit needs {option}= a count of steps from 1 on, got {value!r}")
    return number


def check_length(checkpoints: Checkpoints, position: Position, total: int | None) -> None:
    """Refuse to resume a run that is longer already than it is to be."""
    if total is not None and position.steps > total:
        raise CheckpointError(
            f"{checkpoints.directory / folder.name(position.steps)} is after {position.steps} "
            f"steps, but the run is to make {total}: give steps= (or epochs=) at least as large, "
            "or another folder",
            every_rank=True,
        )


def batches(
    data: Data,
    length: Length,
    at: Position,
    rows_of: Callable[[Any], int],
) -> Iterator[tuple[Position, Any]]:
    """Yield the batches of a run, from a position on.

    Each comes with the position after it.
    """
    first, steps, epochs = at.steps, length.steps, length.epochs
    last = math.inf if steps is None else steps
    while (epochs is None or at.epoch < epochs) and at.steps < last:
        before = at
        for batch in _rest(data(at.epoch) if callable(data) else data, at, rows_of):
            if at.steps >= last:
                return
            rows = at.rows + rows_of(batch)
            at = replace(at, steps=at.steps + 1, batch=at.batch + 1, rows=rows)
            yield at, batch
        if at.batch == 0:
            wanted = "another epoch" if steps is None else f"{steps - first} steps"
            raise ValueError(
                f"fit needs data for {wanted}, but the data ended after {before.steps - first} "
                "batches: pass a list of batches, or a function epoch -> batches, that can be read "
                "again"
            )
        at = replace(at, epoch=at.epoch + 1, batch=0, rows=0)


def _rest(data: Iterable[Any], at: Position, rows_of: Callable[[Any], int]) -> Iterator[Any]:
    """Return an iterator over the batches of an epoch that are not done; the others are read."""
    iterator = iter(data)
    dropped = [rows_of(batch) for batch in itertools.islice(iterator, at.batch)]
    if (len(dropped), sum(dropped)) != (at.batch, at.rows):
        raise ValueError(
            f"fit resumes epoch {at.epoch} after {at.batch} batches of {at.rows} examples, but "
            f"they are {len(dropped)} of {sum(dropped)} now: use the data and the global batch "
            "size that the checkpoint was made with"
        )
    return iterator
