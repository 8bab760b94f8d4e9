"""An engine's steps: each compiled once for its shapes, and run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import jax

from txcore import _compat, step_events
from txcore.launch import watch
from txcore.launch.watch import Phase
from txcore.printing import name_of
from txcore.train.batches.placer import Placed, Placer, Stacked, holds_arrays_alone
from txcore.train.loggers import Metrics
from txcore.train.options import Options
from txcore.train.replicas import agreement
from txcore.train.state import placing
from txcore.train.state.owner import Owner
from txcore.train.state.state import TrainState
from txcore.train.steps import rounds
from txcore.train.steps.compile import CompiledStep, compile_step
from txcore.train.steps.locked import hold_to_lock
from txcore.train.steps.step_fn import StepFn, check_jit, function_of, refuse_tracing


@dataclass(frozen=True, slots=True)
class _Newest:
    """Hold the step that ran last: the same runs again without a look-up."""

    step: Any
    owner: Owner
    form: int | None  # the state's
    batch: int  # the batch's form
    call: Callable[..., Any]
    last_words: str

    def is_for(self, step: Any, state: Any) -> bool:
        """Tell whether it is the program for a step and a state that is not used up."""
        return (
            step is self.step
            and type(state) is TrainState
            and state.form == self.form
            and state.owner is self.owner
            and not state.step.is_deleted()  # jax 0.10 crashes
            and step_events.listener is None
        )


def _may_be_another(error: Exception) -> bool:
    """Tell whether jax may have refused what it was given: it is of another shape or place."""
    return isinstance(error, TypeError | ValueError)


class Steps:
    """Compile the steps of one engine, and run them.

    Attributes:
      options: the engine's.
      owner: what its states are known by.
      spans: whether the mesh has devices of several processes.
      place: places a batch on the mesh.
      rows: returns the rows of the global batch.
      copy: copies a batch on the host.
      stack: places several batches as one.
      last_words: what is running, for a rank that waits in it.
      compile_seconds: seconds spent tracing and compiling so far.
      proof: which proof the newest training step has; "" without a lock file.
    """

    def __init__(self, options: Options, owner: Owner) -> None:
        self.options, self.owner = options, owner
        self.spans = options.spans_processes
        self.last_words = ""
        self.compile_seconds = 0.0
        self.proof = ""
        placer = Placer(options.mesh, options.plan)
        self.place, self.rows = placer.place, placer.rows
        self.copy, self.stack = placer.copy, placer.stack
        self._xla_options = options.xla_options
        self._platform = options.mesh.mesh.devices.flat[0].platform
        self._compiled: dict[Any, CompiledStep] = {}
        self._newest: _Newest | None = None
        self._forms: dict[Any, int] = {}  # of states: structure, shapes and dtypes

    def place_for(self, step: Any, state: Any, batch: Any) -> Placed:
        """Place a batch for a step; refuse what jax traces."""
        refuse_tracing(step, state, batch)
        return self.place(batch)

    def run_on(self, step: Any, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Run one training step on a batch, placed or not; `state` is donated."""
        newest = self._newest
        if newest is not None and newest.is_for(step, state) and holds_arrays_alone(batch):
            # jax compares structure, shapes, dtypes and places with those that it compiled for, in
            # C++, and refuses others before anything runs.
            try:
                arrays, metrics = newest.call(state.returned or state.arrays, batch)
            except Exception as error:
                if not _may_be_another(error):
                    raise
            else:
                self.last_words = newest.last_words
                return state.with_arrays(arrays), metrics
        return self.run(step, state, self.place_for(step, state, batch))

    def run(self, step: Any, state: TrainState, batch: Placed) -> tuple[TrainState, Metrics]:
        """Run one training step on a batch that was placed; `state` is donated."""
        newest = self._newest
        if newest is not None and newest.batch == batch.form and newest.is_for(step, state):
            self.last_words = newest.last_words
            arrays, metrics = newest.call(state.returned or state.arrays, batch.tree)
            return state.with_arrays(arrays), metrics
        state, compiled = self.compile(step, state, batch, train=True)
        ran = self._run(compiled, state, batch.tree)
        if not self.spans and step_events.listener is None:  # else a step is more than its call
            call = _compat.direct_call(compiled.call)
            form = state.form
            self._newest = _Newest(step, self.owner, form, batch.form, call, compiled.last_words)
        return ran

    def run_each(
        self, step: Any, state: TrainState, batches: Sequence[Any]
    ) -> tuple[TrainState, Metrics]:
        """Run a training step for each of several batches, as `Engine.run_many` says."""
        if not isinstance(batches, Sequence) or not batches:
            raise ValueError(
                "run_many needs a list of at least one batch, one for each step, got "
                f"{batches if isinstance(batches, Sequence) else type(batches).__name__}: write "
                "[batch, ...], each as for engine.run"
            )
        refuse_tracing(step, state, batches)
        stacked = self.stack(batches)
        if stacked is None:
            raise ValueError(
                "run_many needs batches of one structure, shapes, dtypes and place, since one "
                "program runs them all, got others: run those that differ by engine.run, or pad "
                "them (tx.pad_batch)"
            )
        return self.run_many(step, state, stacked)

    def run_many(
        self, step: Any, state: TrainState, batches: Stacked
    ) -> tuple[TrainState, Metrics]:
        """Run a training step for each of several batches, in one program; `state` is donated."""
        state, compiled = self.compile(step, state, batches, train=True)
        return self._run(compiled, state, batches.tree)

    def _run(
        self, compiled: CompiledStep, state: TrainState, batch: Any
    ) -> tuple[TrainState, Metrics]:
        if self.spans:
            self.come_to(compiled, state, batch)
        with step_events.during_step(compiled.program):
            arrays, metrics = compiled.call(state.returned or state.arrays, batch)
        state = state.with_arrays(arrays)
        if self.spans:
            agreement.note_equal(state)
        return state, metrics

    def compile(
        self, step: Any, state: TrainState, batch: Placed | Stacked, *, train: bool
    ) -> tuple[TrainState, CompiledStep]:
        """Return the state as the engine's own, and the step compiled for it and the batch.

        Raises:
          ValueError, TypeError: the state is another engine's or used up; or what the step does
            wrong.
        """
        fn = step.fn if type(step) is StepFn else step
        if not self._is_own(state):
            state = self.take(state, fn)
        many = type(batch) is Stacked
        listener = step_events.listener
        told = {} if listener is None else listener.compiler_options(self._platform)
        key = (train, fn, state.form, batch.form, many, bool(told))
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compiled[key] = self._compile(fn, state, batch.tree, train, many, told)
        if train:
            self.last_words = compiled.last_words
        return state, compiled

    def _is_own(self, state: Any) -> bool:
        """Tell whether a state is this engine's, of a known form, and alive."""
        return (
            type(state) is TrainState
            and state.owner is self.owner
            and state.form is not None
            and not state.step.is_deleted()
        )

    def has_compiled(self, step: Any) -> bool:
        """Tell whether the step was compiled as a training step, for some state and batch."""
        fn = function_of(step)
        return any(train and known is fn for train, known, *_ in self._compiled)

    def _compile(
        self,
        fn: Any,
        state: TrainState,
        batch: Any,
        train: bool,
        many: bool,
        told: dict[str, Any],
    ) -> CompiledStep:
        check_jit(name_of(fn))
        watch.at(Phase.COMPILE, label=name_of(fn))
        compiled = compile_step(
            fn,
            state,
            batch,
            mesh=self.options.mesh,
            plan=self.options.plan,
            options={**self._xla_options, **told},
            train=train,
            together=self.spans,
            many=many,
        )
        self.compile_seconds += compiled.seconds
        if train:
            self.proof = hold_to_lock(self.options, compiled, many=many)
        watch.at(Phase.STEP if train else Phase.EVAL_STEP, label=compiled.last_words)
        return compiled

    def take(self, state: TrainState, user: Any) -> TrainState:
        """Return a state as one of this engine, all of it on the mesh.

        Args:
          state: a state that the engine made, or one without an engine.
          user: what needs it: a step, or a name.

        Raises:
          ValueError: it is another engine's, or donated to an earlier step.
        """
        if not isinstance(state, TrainState):
            refuse_other()
        if state.owner is not self.owner and state.owner.engine is not None:
            refuse_other()
        if state.form is None:
            if isinstance(state.step, jax.Array) and state.step.is_deleted():
                refuse_donated(user)
            return self._adopt(state)
        if state.step.is_deleted():
            refuse_donated(user)
        return state

    def _adopt(self, state: TrainState) -> TrainState:
        """Return a state that was put together elsewhere as one whose form is known."""
        given = state.arrays
        arrays = placing.place(given, self.options, given)
        if state.owner is not self.owner or any(arrays[name] is not given[name] for name in given):
            state = TrainState(**arrays, owner=self.owner)
        leaves, treedef = jax.tree.flatten(arrays)
        signature = treedef, tuple((x.shape, x.dtype) for x in leaves)
        vars(state)["form"] = self._forms.setdefault(signature, len(self._forms))
        return state

    def come_to(self, compiled: CompiledStep, state: TrainState, batch: Any) -> None:
        """Do what several processes need before a program of all of them runs."""
        if self.spans:
            self._check_beginning(state, compiled.name, batch)
            if compiled.reduces:
                watch.meet(f"a run of {compiled.name}")

    def check_replicas(
        self, state: TrainState, *, after: int | None = None, since: int | None = None
    ) -> None:
        """Compare the copies of a state, as `Engine.check_replicas` says."""
        self.check_own(state)
        if self.spans:
            self._check_beginning(state, "check_replicas")
            watch.meet("a comparison of the copies of the state")
            watch.at(Phase.COMPARISON)
        agreement.check_copies(state, self.options.mesh.mesh, after, since)
        watch.at(Phase.BETWEEN_STEPS)

    def _check_beginning(self, state: TrainState, name: str, batch: Any = None) -> None:
        """Compare a state over the ranks where it is not known to be equal on all of them."""
        if not agreement.is_equal(state):
            watch.at(Phase.COMPARISON, label=name)
            agreement.check_beginning(self.options, state, name, batch)
            agreement.note_equal(state)

    def end_round(self, state: TrainState) -> TrainState:
        """Average parameters in the middle of a round of local SGD, as `Engine.end_round` says."""
        state = self.take(state, "end_round")
        if self.spans:
            self._check_beginning(state, "end_round")
            watch.meet("an average of the parameters")
        return rounds.end_round(self.options, state)

    def check_own(self, state: TrainState) -> None:
        """Refuse a state that this engine did not make."""
        if not isinstance(state, TrainState) or state.owner is not self.owner:
            refuse_other()


def refuse_other() -> NoReturn:
    """Refuse a state of another engine."""
    raise ValueError("this engine runs states that its create_state made, got another")


def refuse_donated(user: Any) -> NoReturn:
    """Refuse a state that a step has used up."""
    name = user if isinstance(user, str) else name_of(user)
    raise ValueError(
        f"the state given to {name} was donated to an earlier step: keep the "
        "state that the step returns, state, metrics = step(state, batch)"
    )
