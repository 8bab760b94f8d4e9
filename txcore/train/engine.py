"""The engine: runs steps on a mesh by a plan."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax

from txcore.launch.gloo_threads import yield_to_compute
from txcore.mesh import MeshSpec
from txcore.plan.plan import Plan
from txcore.train.loggers import Logger, Metrics
from txcore.train.numerics import nonfinite
from txcore.train.numerics.precision import Precision
from txcore.train.options import Options
from txcore.train.proofs import Proofs
from txcore.train.state import placing
from txcore.train.state.owner import Owner
from txcore.train.state.state import TrainState
from txcore.train.steps import evaluation
from txcore.train.steps.step_fn import StepFn
from txcore.train.steps.steps import Steps

if TYPE_CHECKING:
    from txcore.train.checkpoints.checkpoints import Checkpoints
    from txcore.train.loop.arguments import Evaluate
    from txcore.train.loop.feed import Data


class Engine(Proofs):
    """Run training steps on a mesh, by a plan, and prove what they communicate.

    Args:
      mesh: the devices and their axes.
      plan: what is parallel over which axis.
      optimizer: `tx.optim.sgd(...)`, `tx.optim.adamw(...)`, or any optax transformation.
      loggers: functions of a `tx.loggers.Record`; called on rank 0.
      precision: "float32", "bfloat16", "float16", or a `tx.Precision`.
      seed: the run is a function of it (and of the data): from 0 to 2**32 - 1.
      on_nonfinite: what to do about a NaN or infinity: "stop" ends `fit` where the metric "loss"
        has one; "skip" also lets a step whose reduced gradients have one change nothing (float16
        always does, and lowers its loss scale); "ignore" does nothing.
      compiler_options: XLA options for the steps; None takes the fastest known for the platform
        and precision (`tx.kernels.compiler_options`), but for those that XLA_FLAGS names.
      lock: a lock file: a training step runs only if it is the program that is locked there (see
        `tx.attested`). None takes that of `txcore launch --lock`, if there is one.

    Raises:
      TypeError: `mesh` is no MeshSpec, `plan` no Plan, or `optimizer` no optimizer.
      ValueError: the plan names an axis that the mesh does not have, or an unknown precision.

    Example:
      >>> engine = tx.Engine(mesh=tx.MeshSpec(jax.devices()[:2]), optimizer=tx.optim.sgd(0.1),
      ...                    plan=tx.Plan(data_parallel=tx.DP("data")))
      >>> state = engine.create_state({"w": np.zeros(3, np.float32)})
      >>> int(state.step), state.params["w"].shape
      (0, (3,))
    """

    def __init__(
        self,
        *,
        mesh: MeshSpec,
        plan: Plan,
        optimizer: Any,
        loggers: Sequence[Logger] = (),
        precision: str | Precision = "float32",
        seed: int = 0,
        on_nonfinite: nonfinite.Policy = "stop",
        compiler_options: Mapping[str, Any] | None = None,
        lock: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(precision, Precision):
            precision = Precision(precision)
        options = Options(
            *(mesh, plan, optimizer, loggers, precision, seed, on_nonfinite, compiler_options),
            lock=lock,
        )
        super().__init__(options)
        if jax.process_count() > 1 and mesh.devices[0].platform == "cpu":
            yield_to_compute()
        self._owner = Owner(self)
        self._steps = Steps(options, self._owner)

    def with_optimizer(self, optimizer: Any) -> "Engine":
        """Return an engine that differs in its optimizer alone, without loggers."""
        return Engine(**vars(replace(self._options, optimizer=optimizer, loggers=(), lock=None)))

    @property
    def compile_seconds(self) -> float:
        """Seconds spent tracing and compiling steps so far."""
        return self._steps.compile_seconds

    @property
    def proof(self) -> str:
        """Which proof the newest training step has, in a line; "" without a lock file."""
        return self._steps.proof

    @property
    def last_words(self) -> str:
        """What the newest step is, with its last collective, for `watch.at`."""
        return self._steps.last_words

    def create_state(
        self, params: Any, extra: Any = None, broadcast_from: int | None = None
    ) -> TrainState:
        """Copy parameters to the mesh and start the optimizer.

        In several processes the state is compared bit for bit before its first step: each has to
        make the same one, or to take that of one of them.

        Args:
          params: pytree of arrays; they are copied, yours stay alive. Of an equinox or nnx model
            it is the part that is trained: `eqx.partition`, `nnx.split`. The layers of a pipeline
            are stacked in params["blocks"], (layers, ...), under every plan.
          extra: pytree of model state that is not trained (batch statistics, PRNG keys).
          broadcast_from: the rank whose state all take: parameters, optimizer state, `extra` and
            seed; the others give the same leaves with any values. `audit_broadcast` shows what is
            sent.

        Returns:
          The state of a run that has made no step yet.

        Raises:
          TypeError: a leaf is no array; the error says what to do with an equinox or nnx model.
          ValueError: `broadcast_from` is no rank of this run.
          MismatchError: with `broadcast_from`, the leaves of the ranks differ in path, dtype or
            shape.
        """
        arrays, given = placing.create_arrays(self._options, params, extra, broadcast_from)
        return TrainState(**arrays, owner=self._owner).made_of(given)

    def place(self, fields: dict[str, Any], state: TrainState) -> dict[str, Any]:
        """Return fields of a state as arrays on the mesh, by its layouts; copy what is not there.

        Args:
          fields: pytrees of arrays and numbers by name, some of them new.
          state: the state whose fields they are to take the place of.

        Raises:
          TypeError: a leaf is no array.
        """
        return placing.place(fields, self._options, state.arrays)

    def kept(self, params: Any) -> Any:
        """Return what the plan's communication keeps from step to step (`Plan.kept`)."""
        return self.plan.kept(params, self.mesh, self.optimizer)

    def end_round(self, state: TrainState) -> TrainState:
        """Average the devices' parameters before a round of local SGD (`DP(sync_every=)`) is over.

        `state.stored_params`, which evaluations and checkpoints are of, has the last average; what
        the devices have done since is in `state.comm_state`. After the last step of a run whose
        steps are no multiple of `sync_every` this makes the exchange that is due; the next one
        stays where it is. A state at the end of a round, or of another plan, is returned as it is.
        Every process has to come.

        Args:
          state: a state that this engine made; it is not donated.

        Returns:
          The state with the new average, and the same step.

        Example:
          >>> plan = tx.Plan(data_parallel=tx.DP("data", sync_every=8))
          >>> engine = tx.Engine(mesh=tx.MeshSpec(jax.devices()[:2]), optimizer=tx.optim.sgd(0.1),
          ...                    plan=plan)
          >>> state = engine.create_state({"w": np.zeros(3, np.float32)})
          >>> engine.end_round(state) is state
          True
        """
        return self._steps.end_round(state)

    def run(self, step: StepFn, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Run one training step; `state` is donated.

        Args:
          step: the step.
          state: a state that this engine made.
          batch: pytree of host arrays, the global batch (in one process) or this process's
            part of it (in several).

        Returns:
          The new state, and the step's metrics (arrays on the devices).

        Raises:
          ValueError, TypeError: what the step does wrong, found before anything runs.
        """
        return self._steps.run_on(step, state, batch)

    def run_many(
        self, step: StepFn, state: TrainState, batches: Sequence[Any]
    ) -> tuple[TrainState, Metrics]:
        """Run a training step for each of several batches, in one program; `state` is donated.

        The host starts one program in place of several, which gains where a step is shorter than
        its start: short steps on GPUs and TPUs. Each number of batches is compiled once.
        `fit(steps_per_call=)` does it between evaluations and checkpoints.

        Args:
          step: the step.
          state: a state that this engine made.
          batches: as for `run`, all of one structure, shapes and dtypes.

        Returns:
          The new state, and the step's metrics, each with a first dim of as many as batches.

        Raises:
          ValueError, TypeError: there is no batch, they are not alike, or what the step does wrong.

        Example:
          >>> @tx.step_fn
          ... def step(state, batch):
          ...     loss, grads = tx.value_and_grad(lambda w: jax.numpy.mean(w * batch))(state.params)
          ...     state = state.apply_gradients(grads=tx.pmean(grads, "data"))
          ...     return state, {"loss": tx.pmean(loss, "data")}
          >>> engine = tx.Engine(mesh=tx.MeshSpec(jax.devices()[:2]), optimizer=tx.optim.sgd(0.5),
          ...                    plan=tx.Plan(data_parallel=tx.DP("data")))
          >>> state = engine.create_state(np.float32(1))
          >>> state, metrics = engine.run_many(step, state, [np.arange(4.0)] * 3)
          >>> int(state.step), metrics["loss"].tolist()
          (3, [1.5, 0.375, -0.75])
        """
        return self._steps.run_each(step, state, batches)

    def evaluate(self, step: Any, state: TrainState, data: Iterable[Any]) -> Metrics:
        """Average a step's metrics over batches, weighted by their real examples.

        Args:
          step: `(state, batch) -> metrics`, plain or decorated by `tx.step_fn`; each metric is
            a mean over the examples of the global batch (`tx.pmean` of `tx.example_mean`), or a
            `tx.Mean(total, count)` of anything else, tokens for one, which are added up.
          state: the state; it is not donated.
          data: batches as for `run`; a leaf "mask" says which examples are real.

        Returns:
          The metrics as Python floats.

        Raises:
          ValueError: no batch, a metric that still varies along an axis, or, of several batches,
            one that is a mean over something else than examples.
          TypeError: the step returns something else than a dict.
        """
        return evaluation.evaluate(self._steps, step, state, data)

    def fit(
        self,
        step: StepFn,
        state: TrainState,
        data: "Data",
        *,
        steps: int | None = None,
        epochs: int | None = None,
        evaluate: "Evaluate | None" = None,
        eval_every: int | None = None,
        checkpoints: "Checkpoints | None" = None,
        check_replicas_every: int | None = None,
        prefetch: int = 2,
        steps_per_call: int = 1,
    ) -> TrainState:
        """Train: run the step over batches, tell the loggers, and save checkpoints.

        With checkpoints the run goes on where the newest one ends, else where `state.step` is.
        SIGTERM and SIGINT stop it between two steps, in several processes all of them, saved if
        there are checkpoints; a second SIGINT ends at once. Every exception has the newest state as
        `error.state`, None where a step failed that had been given it.

        Args:
          step: the training step.
          state: the state to start from; it is donated.
          data: batches as for `run`: an iterable that can be read again, or a function
            `epoch -> batches`. To resume within an epoch its first batches are read and dropped.
          steps: how many steps the run is to have, those before among them (before a checkpoint,
            or by an earlier `fit`); or
          epochs: how many times to go through the data, those before a checkpoint among them.
          evaluate: called with the state every `eval_every` steps and after the last; returns
            metrics (`lambda state: engine.evaluate(eval_step, state, test_batches)`).
          eval_every: steps between evaluations; None evaluates after the last step only.
          checkpoints: where and how often to save the run, and whether to resume it.
          check_replicas_every: steps between comparisons of the state's copies on all devices, bit
            for bit (`check_replicas`): before the first step, and after every so many.
          prefetch: how many batches a thread reads, cuts and sends while the step runs; with 0 each
            is read when its step is due (docs/data.md).
          steps_per_call: how many steps there are in one program (`run_many`). Checkpoints,
            evaluations and signals come between two programs; steps that are too few for one, at
            the end or after resuming, run one by one.

        Returns:
          The state after the last step.

        Raises:
          MismatchError: the ranks differ in these arguments (but for what data and evaluate do), in
            the engine or in the state, before the first step; or copies that have to be equal
            differ (`check_replicas_every`); or the ranks ended at other batches.
          ValueError: neither or both of `steps` and `epochs`, a state that has made more steps, or
            data that ends too early or does not fit the checkpoint.
          FloatingPointError: the loss is not finite, or a parameter that is to be saved; see
            `on_nonfinite`.
          CheckpointError: no checkpoint can be used or made, the newest one is of more steps than
            this run is to make, the last one could not be written, or `evaluate` does not return
            the metric of `keep_best`.
          SystemExit, KeyboardInterrupt: after SIGTERM (with exit code 143) and SIGINT.
        """
        from txcore.train.loop import fit as loop  # not all that make an engine train with it

        return loop.fit(
            self._steps,
            self.loggers,
            step,
            state,
            data,
            steps=steps,
            epochs=epochs,
            evaluate=evaluate,
            eval_every=eval_every,
            checkpoints=checkpoints,
            check_replicas_every=check_replicas_every,
            prefetch=prefetch,
            steps_per_call=steps_per_call,
        )
