"""The training loop: feed batches to a step, keep the devices busy, tell the loggers, save."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import jax

from txcore import step_events
from txcore.launch import watch
from txcore.launch.watch import Phase
from txcore.printing import name_of
from txcore.train.batches.placer import Placed, Stacked
from txcore.train.checkpoints.checkpoints import Checkpoints
from txcore.train.checkpoints.manifest import Position
from txcore.train.loggers import Logger, Metrics
from txcore.train.loop.arguments import (
    Evaluate,
    Length,
    check_count,
    check_evaluation,
    check_length,
    check_prefetch,
    check_rest,
    check_steps_per_call,
    count_steps_made,
    warn_user,
)
from txcore.train.loop.error_state import give_state, is_alive
from txcore.train.loop.feed import Data, Reading, group_steps, lies_on_devices, read_batches
from txcore.train.loop.interrupt import Interrupt, interrupts
from txcore.train.loop.prefetch import Reader
from txcore.train.loop.progress import Progress, to_host
from txcore.train.numerics import nonfinite
from txcore.train.replicas import agreement
from txcore.train.state.state import TrainState
from txcore.train.steps.rounds import steps_begun
from txcore.train.steps.step_fn import StepFn, refuse_tracing
from txcore.train.steps.steps import Steps


def fit(
    runner: Steps,
    loggers: Sequence[Logger],
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
    prefetch: int = 2,
    steps_per_call: int = 1,
) -> TrainState:
    """Train as `Engine.fit` says."""
    run = Run(runner, step, state, evaluate, checkpoints)
    with interrupts() as interrupt:  # until the last checkpoint is complete
        try:
            if jax.process_count() > 1:
                watch.start()  # where tx.initialize did not
            length = Length.of_arguments(steps, epochs)
            run.eval_every = check_evaluation(evaluate, eval_every, checkpoints)
            run.compare_every = check_count("check_replicas_every", check_replicas_every)
            run.prefetch = check_prefetch(prefetch)
            every = {
                "eval_every": run.eval_every,
                "check_replicas_every": run.compare_every,
                "Checkpoints(every)": None if checkpoints is None else checkpoints.every,
            }
            run.steps_per_call = check_steps_per_call(steps_per_call, every)
            run.state = runner.take(state, "fit")
            agreement.forget_equal(run.state)  # whatever was done to it
            if runner.spans:
                agreement.check_fit(
                    runner.options,
                    data,
                    steps=length.steps,
                    epochs=length.epochs,
                    evaluate=evaluate,
                    eval_every=run.eval_every,
                    checkpoints=checkpoints,
                    check_replicas_every=run.compare_every,
                    steps_per_call=run.steps_per_call,
                )
            return train(run, loggers, data, length, interrupt)
        except BaseException as error:
            interrupt.hold()  # it ends already
            newest = checkpoints.describe_newest() if isinstance(checkpoints, Checkpoints) else None
            give_state(error, run.state, newest)
            raise


def train(
    run: "Run", loggers: Sequence[Logger], data: Data, length: Length, interrupt: Interrupt
) -> TrainState:
    """Run the steps; if a signal came, end the program as the signal asks."""
    begun = False
    try:
        with run.checkpoints or nullcontext():
            run.begin(loggers, data, length)
            begun = True
            if run.compare_every:
                run.compare_copies()
            with run.read(data, length, interrupt) as batches:
                for after, batch in step_events.told_of(iter(batches)):
                    if interrupt.is_due(run.position.steps):
                        break
                    run.start_step(batch, after, interrupt)
                    if run.is_due(run.eval_every):
                        run.evaluate_once()
                    if run.is_to_be_saved():
                        run.save_once()
                    if run.is_due(run.compare_every):
                        run.compare_copies()
                    watch.at(Phase.DATA, run.position.steps)
            run.wait_for_steps()
            if interrupt.stopped is None:
                run.evaluate_once()
            run.save_once()
            run.compare_ends()
            run.tell_unaveraged()
    except BaseException as error:
        # Once the checkpoint under way is whole, and the steps that are: the others, which end
        # when they are told, have to be there for both.
        is_alive(run.state)
        # An error that every rank raises is not reported to the others: all may go on after it, as
        # after a MismatchError.
        if begun and not (isinstance(error, FloatingPointError) and run.fails_alike(error)):
            watch.failed(error)
        raise
    if interrupt.stopped is None and not interrupt.is_due(run.position.steps):
        interrupt.stopped = interrupt.asked  # too late for the others to stop with this process
    watch.at(Phase.AFTER_FIT, run.position.steps)
    if interrupt.stopped is not None:
        run.tell_stopped(watch.stop_reason() or interrupt.stopped.name)
        interrupt.end()
    run.progress.tell("end", {})
    return run.state


@dataclass
class Run:
    """Hold the state of a running `fit`, with what it does between two batches."""

    runner: Steps
    step: StepFn
    state: TrainState
    evaluate: Evaluate | None
    checkpoints: Checkpoints | None
    eval_every: int | None = None
    compare_every: int | None = None
    prefetch: int = 0
    steps_per_call: int = 1
    evaluates: bool = False  # just now

    def begin(self, loggers: Sequence[Logger], data: Data, length: Length) -> None:
        """Start from the newest checkpoint, or else from the given state."""
        given, made = self.state, count_steps_made(self.state)
        self.position = Position(steps=made)
        if self.checkpoints is not None:
            self.state, found = self.checkpoints.restore(given)
            self.position = found if self.state is not given else self.position
        total = length.count_steps(data, self.position)
        if self.checkpoints is not None and self.state is not given:
            check_length(self.checkpoints, self.position, total)
            if self.position.steps < made:
                told = "the checkpoint is after %d steps, and the state given to fit after %d: "
                warn_user(told + "it goes on from the checkpoint", self.position.steps, made)
        elif total is not None and made:
            check_rest(made, total)
        self.progress = Progress(self.runner, loggers, total, self.position, self._check)
        self.evaluated, self.saved = 0, self.position.steps  # after so many steps
        self.metrics: Metrics = {}  # of the last evaluation
        self.equal: int | None = None  # the number of steps after which all copies were

    def _check(self, done: int, metrics: Metrics) -> None:
        nonfinite.check_loss(done, metrics, self.state, self.runner.options.on_nonfinite)

    def read(self, data: Data, length: Length, interrupt: Interrupt) -> Reader:
        """Return the batches from the position on, on the mesh, read ahead where that gains."""
        refuse_tracing(self.step, self.state, ())
        runner, several = self.runner, jax.process_count() > 1
        ahead = 0 if lies_on_devices(data) else self.prefetch
        made: Reading[Placed] | Reading[Placed | Stacked]
        if self.steps_per_call == 1:
            made = read_batches(data, length, self.position, runner.place, runner.rows)
        else:
            copied = read_batches(data, length, self.position, runner.copy, runner.rows)
            made = group_steps(copied, self.steps_per_call, runner.stack, runner.place)
        if several:
            return Reader(made, ahead, begins_here=True)

        def should_end() -> bool:
            return interrupt.is_due(self.position.steps)

        reader = Reader(made, ahead, should_end=should_end)
        interrupt.wake = reader.wake
        return reader

    def start_step(self, batch: Placed | Stacked, after: Position, interrupt: Interrupt) -> None:
        """Dispatch a step, or several of one program; wait for older ones if too many run."""
        runner = self.runner
        if runner.spans and self.equal is not None and self.equal == self.position.steps:
            # As the copies of the state were.
            agreement.check_batch(batch.tree, runner.options.mesh.mesh, name_of(self.step))
        self.progress.start_clock()
        watch.at(Phase.STEP, self.position.steps, runner.last_words)
        if runner.spans:
            at = f"batch {after.batch} of epoch {after.epoch}, step {after.steps} of fit"
            # The comparison before a step's first run says more of other rows than an event does.
            compared = not runner.has_compiled(self.step)
            watch.meet(at if compared else f"{at}, {batch.rows} rows")
        interrupt.hold()
        try:
            if isinstance(batch, Stacked):
                self.state, metrics = runner.run_many(self.step, self.state, batch)
            else:
                self.state, metrics = runner.run(self.step, self.state, batch)
        finally:
            interrupt.release()
        self.position = after
        self.progress.add(metrics, batch.real)

    def wait_for_steps(self) -> None:
        """Wait for the dispatched steps."""
        watch.at(Phase.STEP, self.position.steps, self.runner.last_words)
        self.progress.stop_clock()

    def evaluate_once(self) -> None:
        """Evaluate the state, unless no evaluation is asked for or this state has had one."""
        if self.evaluate is None or self.evaluated == self.position.steps:
            return
        self.wait_for_steps()
        self.evaluates = True
        self.metrics = to_host(self.evaluate(self.state))
        self.evaluates = False
        self.progress.tell("eval", self.metrics)
        self.evaluated = self.position.steps

    def fails_alike(self, error: BaseException) -> bool:
        """Tell whether all ranks find a loss or a parameter, or an evaluation, not finite.

        Losses and parameters are equal on all ranks; of what an evaluation raises that is asked.
        """
        if self.evaluates and self.runner.spans:
            return agreement.fails_alike(error, self.position.steps)
        return True

    def is_due(self, every: int | None) -> bool:
        """Tell whether an action that runs every `every` steps is due after this step."""
        return every is not None and self.position.steps % every == 0

    def is_to_be_saved(self) -> bool:
        """Tell whether a checkpoint is due, or the state has just proved the best so far."""
        if self.checkpoints is None:
            return False
        if self.is_due(self.checkpoints.every):
            return True
        return self.evaluated == self.position.steps and self.checkpoints.improved_by(self.metrics)

    def save_once(self) -> None:
        """Start to write a checkpoint, unless there is no folder or this state was saved."""
        if self.checkpoints is None:
            return
        metrics = self.metrics if self.evaluated == self.position.steps else None
        if self.saved == self.position.steps:
            if metrics is not None and self.saved:
                self.checkpoints.note(self.position, metrics)
            return
        self.wait_for_steps()
        nonfinite.check_parameters(
            self.position.steps, self.state, self.runner.options.on_nonfinite
        )
        watch.at(Phase.SAVE, self.position.steps)
        if self.runner.spans:
            watch.meet(f"a checkpoint after {self.position.steps} steps")
        self.saved = self.position.steps
        self.checkpoints.save(self.state, self.progress.position(self.position), metrics)

    def compare_copies(self) -> None:
        """Raise an error if copies that have to be equal differ."""
        self.wait_for_steps()
        steps = self.position.steps
        self.runner.check_replicas(self.state, after=steps, since=self.equal)
        self.equal = steps

    def compare_ends(self) -> None:
        """Raise an error if the loop ended at another batch on another rank."""
        if self.runner.spans:
            watch.meet(f"the end of fit, after {self.position.steps} steps")
            watch.at(Phase.COMPARISON, self.position.steps, "the end of fit")
            agreement.check_end(self.position)

    def tell_unaveraged(self) -> None:
        """Warn, in the middle of a round, that the last steps are not in the parameters yet."""
        begun = steps_begun(self.runner.options, self.state)
        if begun:
            warn_user(
                "fit ends %d steps after the last average of the parameters (DP(sync_every=)): "
                "engine.end_round(state) averages them now",
                begun,
            )

    def tell_stopped(self, name: str) -> None:
        """Log which signal stopped the run, and which checkpoint it leaves."""
        kept = "; nothing is saved without checkpoints= (the exception has the state)"
        kept = ", all saved" if self.checkpoints else kept
        warn_user("%s: stopped after %d steps%s", name, self.position.steps, kept)
