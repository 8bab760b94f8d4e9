"""The training loop: feed batches to a step, keep the devices busy, tell the loggers, save."""

import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from txcore.launch import watch
from txcore.plan import Plan
from txcore.train import agreement, nonfinite
from txcore.train import checkpoint_folder as folder
from txcore.train.batch import examples, shard_batch
from txcore.train.checkpoints import Checkpoints
from txcore.train.interrupt import Interrupt, interrupts
from txcore.train.loggers import Metrics, Record
from txcore.train.manifest import CheckpointError, Position
from txcore.train.state import TrainState
from txcore.train.step_fn import StepFn

if TYPE_CHECKING:
    from txcore.train.engine import Engine

Data = Iterable[Any] | Callable[[int], Iterable[Any]]
Evaluate = Callable[[TrainState], Metrics]

# How many steps the host may run ahead of the devices: enough to hide its work, few enough not
# to pile up batches. A simulated device shares the host's cores: what waits there takes time from
# the step under way.
RUN_AHEAD, RUN_AHEAD_ON_CPU = 4, 1

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
    total = count_steps(data, steps, epochs)
    check_count("check_replicas_every", check_replicas_every)
    if eval_every is not None and (eval_every < 1 or evaluate is None):
        raise ValueError(
            f"fit needs eval_every= at least 1 and evaluate= with it, got {eval_every=}"
        )
    if jax.process_count() > 1:
        watch.start()  # where tx.initialize did not
    if engine.spans:
        agreement.check_fit(
            engine,
            data,
            steps=steps,
            epochs=epochs,
            evaluate=evaluate,
            eval_every=eval_every,
            checkpoints=checkpoints,
            check_replicas_every=check_replicas_every,
        )
    with ExitStack() as stack:
        position, interrupt = Position(), Interrupt()
        if checkpoints is not None or jax.process_count() > 1:
            interrupt = stack.enter_context(interrupts())  # until the last save is whole
        # After the checkpoint under way is whole, for which the others have to be there.
        stack.enter_context(told())
        if checkpoints is not None:
            stack.enter_context(checkpoints)
            state, position = checkpoints.restore(state)
            check_length(checkpoints, position, total)
        run = Run(engine, state, position, total, evaluate, checkpoints)
        if check_replicas_every:
            run.compare_copies()
        for after, host in batches(data, steps, epochs, position, run.rows):
            if interrupt.due(run.position.steps):
                break
            run.make(step, host, after)
            if eval_every and run.position.steps % eval_every == 0:
                run.evaluate_once()
            if checkpoints and run.position.steps % checkpoints.every == 0:
                run.save_once()
            if check_replicas_every and run.position.steps % check_replicas_every == 0:
                run.compare_copies()
            watch.at("data", run.position.steps)
        run.wait()
        if interrupt.stopped is None:
            run.evaluate_once()
        run.save_once()
        if engine.spans:
            watch.meet(f"the end of fit, after {run.position.steps} steps")
            watch.at("comparison", run.position.steps, "the end of fit")
            agreement.check_end(run.position)
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
    position: Position
    total: int | None
    evaluate: Evaluate | None
    checkpoints: Checkpoints | None

    def __post_init__(self) -> None:
        self.progress = Progress(self.engine, self.total, self.position, self._check)
        self.evaluated, self.saved = 0, self.position.steps  # after so many steps
        self.equal: int | None = None  # after so many steps all copies were

    def _check(self, done: int, metrics: Metrics) -> None:
        nonfinite.check(done, metrics, self.state, self.engine.on_nonfinite)

    def rows(self, host: Any) -> int:
        """Return how many rows the global batch has of which `host` is this process's part."""
        return examples(host, self.engine.plan)[0] * jax.process_count()

    def make(self, step: StepFn, host: Any, after: Position) -> None:
        """Start a step; wait for an older one if too many are under way."""
        engine = self.engine
        batch = shard_batch(host, engine.mesh, engine.plan)
        self.progress.start_clock()
        watch.at("step", self.position.steps, engine.last_words)
        if engine.spans:
            watch.meet(f"batch {after.batch} of epoch {after.epoch}, step {after.steps} of fit")
        self.state, metrics = engine.run(step, self.state, batch)
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
        self.progress.tell("eval", to_host(self.evaluate(self.state)))
        self.evaluated = self.position.steps

    def save_once(self) -> None:
        """Start to write a checkpoint, unless there is nowhere to or it was done."""
        if self.checkpoints is None or self.saved == self.position.steps:
            return
        self.wait()
        nonfinite.check_parameters(self.position.steps, self.state, self.engine.on_nonfinite)
        watch.at("save", self.position.steps)
        if self.engine.spans:
            watch.meet(f"a checkpoint after {self.position.steps} steps")
        self.checkpoints.save(self.state, self.progress.position(self.position))
        self.saved = self.position.steps

    def compare_copies(self) -> None:
        """Refuse to go on where copies that have to be equal differ."""
        self.wait()
        steps = self.position.steps
        self.engine.check_replicas(self.state, after=steps, since=self.equal)
        self.equal = steps

    def tell_stopped(self, name: str) -> None:
        """Say by which signal the run stopped, and what is left of it."""
        steps = self.position.steps
        kept = ", all saved" if self.checkpoints else "; nothing is saved without checkpoints="
        if jax.process_index() == 0:
            _LOG.warning("txcore: %s: stopped after %d steps%s", name, steps, kept)


@contextmanager
def told() -> Iterator[None]:
    """Tell the other processes of an error that ends this one; it goes on."""
    try:
        yield
    except BaseException as error:
        watch.failed(error)
        raise


def count_steps(data: Data, steps: int | None, epochs: int | None) -> int | None:
    """Check `steps` and `epochs`, and return the number of steps if it is known."""
    if (steps is None) == (epochs is None):
        raise ValueError(f"fit needs one of steps= and epochs=, got {steps=} and {epochs=}")
    given = steps if steps is not None else epochs
    if not isinstance(given, int) or given < 0:
        raise ValueError(f"fit needs steps= or epochs= a count from 0 on, got {given!r}")
    if epochs is not None:
        return epochs * len(data) if isinstance(data, Sized) else None
    return steps


def check_count(option: str, value: Any) -> None:
    """Refuse what is no count of steps."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"fit needs {option}= a count of steps from 1 on, got {value!r}")


def check_length(checkpoints: Checkpoints, position: Position, total: int | None) -> None:
    """Refuse to resume a run that is longer already than it is to be."""
    if total is not None and position.steps > total:
        raise CheckpointError(
            f"{checkpoints.directory / folder.name(position.steps)} is after {position.steps} "
            f"steps, but the run is to make {total}: give steps= (or epochs=) at least as large, "
            "or another folder"
        )


def batches(
    data: Data,
    steps: int | None,
    epochs: int | None,
    at: Position,
    rows_of: Callable[[Any], int],
) -> Iterator[tuple[Position, Any]]:
    """Yield the batches of `steps` steps or of `epochs` passes over `data`, from a position on.

    Each comes with the position after it.
    """
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
            raise ValueError(
                f"fit needs data for {steps if steps is not None else 'another'} "
                f"{'steps' if steps is not None else 'epoch'}, but the data ended after "
                f"{before.steps} batches: pass a list of batches, or a function epoch -> batches, "
                "that can be read again"
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


@dataclass
class Progress:
    """Turn the metrics of finished steps into records, and time them, compilation left out."""

    engine: "Engine"
    total_steps: int | None
    start: Position
    check: Callable[[int, Metrics], None]
    pending: deque[tuple[Any, int]] = field(default_factory=deque)
    _mark: float | None = None  # when the clock was started; None while it stands

    def __post_init__(self) -> None:
        self.done, self.seconds = self.start.steps, self.start.seconds
        self.examples = self.start.examples
        self.loggers = self.engine.loggers if jax.process_index() == 0 else ()
        on_cpu = self.engine.mesh.devices[0].platform == "cpu"
        self.run_ahead = RUN_AHEAD_ON_CPU if on_cpu else RUN_AHEAD
        self._wrote: dict[int, bool] = {}  # by the logger's place: whether it got the last record

    def position(self, reached: Position) -> Position:
        """Return a position with the time and the examples so far."""
        return replace(reached, seconds=self.seconds, examples=self.examples)

    def start_clock(self) -> None:
        """Count time from now on, if the clock stands."""
        if self._mark is None:
            self._mark = self._now()

    def _now(self) -> float:
        return time.perf_counter() - self.engine.compile_seconds

    def stop_clock(self) -> None:
        """Wait for the steps that are under way, and stop counting."""
        while self.pending:
            self._finish_one()
        self._mark = None

    def add(self, metrics: Any, examples: int) -> None:
        """Note a step that was dispatched; wait for an older one if too many are under way."""
        self.pending.append((metrics, examples))
        while len(self.pending) > self.run_ahead:
            self._finish_one()

    def _finish_one(self) -> None:
        metrics, examples = self.pending.popleft()
        host = to_host(metrics)
        now = self._now()
        elapsed = now - self._mark if self._mark is not None else 0.0
        self._mark = now if self._mark is not None else None
        self.done += 1
        self.seconds += elapsed
        self.examples += examples
        self.tell("step", host)
        self.check(self.done, host)

    def tell(self, kind: str, metrics: Metrics) -> None:
        """Send a record to the loggers."""
        record = Record(
            kind,
            self.done,
            self.total_steps,
            metrics,
            self.seconds,
            self.examples,
            self.engine.compile_seconds,
        )
        for i, logger in enumerate(self.loggers):
            try:
                logger(record)
                self._wrote[i] = True
            except OSError as error:
                if i not in self._wrote:
                    raise
                if self._wrote[i]:  # a full disk must not end a run of days
                    _LOG.warning("txcore: a logger failed, and training goes on: %s", error)
                self._wrote[i] = False


def to_host(metrics: Any) -> Metrics:
    """Return metrics as Python floats (lists for arrays), waiting for the devices."""
    return jax.tree.map(lambda value: np.asarray(value).tolist(), metrics)


def real_examples(host: Any, placed: Any, plan: Plan) -> int:
    """Return the real examples of a global batch; `host` is this process's part of it.

    In several processes it is an estimate by this process's mask: throughput needs no
    communication of its own.
    """
    total, mask = examples(placed, plan)[0], examples(host, plan)[1]
    return round(total * float(np.mean(mask != 0))) if isinstance(mask, np.ndarray) else total
