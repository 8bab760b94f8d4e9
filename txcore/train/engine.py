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
from txcore.train.options import Options, OptionsView
from txcore.train.state import placing
from txcore.train.state.owner import Owner
from txcore.train.state.state import TrainState
from txcore.train.steps import evaluation, proof
from txcore.train.steps.step_fn import StepFn
from txcore.train.steps.steps import Steps

if TYPE_CHECKING:
    from txcore.profiling import Report
    from txcore.train.checkpoints.checkpoints import Checkpoints
    from txcore.train.loop.arguments import Evaluate
    from txcore.train.loop.feed import Data


class Engine(OptionsView):
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
      compiler_options: XLA options for the steps; None takes the fastest known for the platform.
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

    def audit_broadcast(self, state: TrainState, broadcast_from: int = 0) -> "Report":
        """Account for every collective by which `create_state(broadcast_from=)` sends a state.

        Args:
          state: a state that this engine made; nothing of it is sent.
          broadcast_from: the rank whose state would be sent.

        Returns:
          A `txcore.profiling.Report` of the compiled program.

        Raises:
          ValueError: `broadcast_from` is no rank of this run, or the state another engine's.

        Example:
          >>> engine = tx.Engine(mesh=tx.MeshSpec(jax.devices()[:2]), optimizer=tx.optim.sgd(0.1),
          ...                    plan=tx.Plan(data_parallel=tx.DP("data")))
          >>> report = engine.audit_broadcast(engine.create_state({"w": np.zeros(3, np.float32)}))
          >>> report.ok, {c.kind for c in report.collectives}
          (True, {'all-reduce'})
        """
        from txcore.profiling import audit

        self._steps.check_own(state)
        return audit(*placing.broadcast_program(state.arrays, self.mesh, broadcast_from))

    def check_replicas(
        self, state: TrainState, *, after: int | None = None, since: int | None = None
    ) -> None:
        """Compare the copies of a state on all devices and ranks, bit for bit.

        Cheap: digests are made on the devices and compared there. Every process has to come.

        Args:
          state: a state that this engine made; it is not donated.
          after: how many steps were made, for the message.
          since: after how many the copies were last known to be equal.

        Raises:
          MismatchError: copies differ; names leaf, devices and ranks, on every rank alike.

        Example:
          >>> engine = tx.Engine(mesh=tx.MeshSpec(jax.devices()[:2]), optimizer=tx.optim.sgd(0.1),
          ...                    plan=tx.Plan(data_parallel=tx.DP("data")))
          >>> state = engine.create_state({"w": np.zeros(3, np.float32)})
          >>> engine.check_replicas(state)
        """
        self._steps.check_replicas(state, after=after, since=since)

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
        steps = self._steps
        return steps.run(step, state, steps.place_for(step, state, batch))

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
        )

    def audit(
        self,
        step: StepFn,
        state: TrainState,
        batch: Any,
        *,
        target: str | None = None,
        mesh: Mapping[str, int] | None = None,
    ) -> "Report":
        """Account for every collective of the compiled step, here or on another machine.

        Args:
          step: the training step.
          state: a state that this engine made; it is not used up.
          batch: a batch as for `run`; with `target` one data shard of it, as arrays or shapes.
          target: a machine to compile for, which need not be here: "tpu:v5p:16x16x16",
            "cuda:h100:64x8" (hosts x GPUs), "cpu:8".
          mesh: the target's axes and their sizes, `{"data": 512}`; needed with `target`.

        Returns:
          A `txcore.profiling.Report`; `report.status` is the answer.

        Raises:
          ValueError: no such target, or a mesh that does not fit it or the plan.
          TypeError: one of `target` and `mesh` without the other.
          ImportError, RuntimeError: the target's compiler is missing or does not work.

        Example:
          >>> engine = tx.Engine(mesh=tx.MeshSpec(jax.devices()[:2]), optimizer=tx.optim.sgd(0.1),
          ...                    plan=tx.Plan(data_parallel=tx.DP("data")))
          >>> state = engine.create_state({"w": np.zeros(3, np.float32)})
          >>> @tx.step_fn
          ... def step(state, batch):
          ...     loss_of = lambda params: tx.example_mean((batch @ params["w"]) ** 2, axis="data")
          ...     loss, grads = tx.value_and_grad(loss_of)(state.params)
          ...     state = state.apply_gradients(grads=tx.pmean(grads, "data"))
          ...     return state, {"loss": tx.pmean(loss, "data")}
          >>> shard = np.ones((4, 3), np.float32)
          >>> report = engine.audit(step, state, shard, target="cpu:8", mesh={"data": 8})
          >>> report.ok, report.target, report.payload_bytes
          (True, 'cpu:8', 16)
        """
        if (target is None) != (mesh is None):
            raise TypeError(
                "engine.audit needs target= and mesh= together, as target='cuda:h100:8', "
                f"mesh={{'data': 8}}, got {target=}, {mesh=}"
            )
        if target is None or mesh is None:
            return proof.audit_here(self._steps, step, state, batch)
        from txcore.profiling.targets import parse_target

        self._steps.check_own(state)
        machine = parse_target(target)
        devices = list(machine.mesh(mesh).devices.flat)
        there = MeshSpec(devices, tuple(mesh), tuple(mesh.values()))
        engine = Engine(**vars(replace(self._options, mesh=there)))
        report = proof.audit_there(engine._options, engine._owner, machine, step, state, batch)
        return replace(report, target=target)
