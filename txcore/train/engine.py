"""The engine: runs steps on a mesh by a plan."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from txcore import _compat
from txcore.kernels import compiler_options as default_compiler_options
from txcore.kernels.common.checks import whole_number
from txcore.launch import watch
from txcore.launch.gloo_threads import yield_to_compute
from txcore.mesh import MeshSpec
from txcore.optim import as_optimizer
from txcore.plan.plan import Plan
from txcore.printing import format_call
from txcore.train import fit as loop
from txcore.train.batch import examples, global_shapes, shapes_on, shard_batch
from txcore.train.checkpoints.checkpoints import Checkpoints
from txcore.train.compile import CompiledStep, compile_step, name_of
from txcore.train.loggers import Logger, Metrics
from txcore.train.numerics import loss_scale, nonfinite
from txcore.train.numerics.precision import Precision
from txcore.train.replicas import agreement, digests
from txcore.train.replicas.copies import copies
from txcore.train.state import TrainState
from txcore.train.step_fn import StepFn, check_jit, refuse_tracing

if TYPE_CHECKING:
    from txcore.profiling import Report


class Engine:
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

    Raises:
      TypeError: `mesh` is no MeshSpec, `plan` no Plan, or `optimizer` no optimizer.
      ValueError: the plan names an axis that the mesh does not have, or an unknown precision.

    Example:
      >>> engine = tx.Engine(mesh=tx.MeshSpec(jax.devices()[:2]), plan=tx.Plan(tx.DP("data")),
      ...                    optimizer=tx.optim.sgd(0.1))
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
    ) -> None:
        if not isinstance(mesh, MeshSpec):
            raise TypeError(
                f"Engine needs mesh= a tx.MeshSpec, got {type(mesh).__name__}: write "
                "tx.MeshSpec(devices=..., axes=..., shape=...)"
            )
        if not isinstance(plan, Plan):
            raise TypeError(f"Engine needs plan= a tx.Plan, got {type(plan).__name__}")
        number = whole_number(seed)
        if number is None or not 0 <= number < 2**32:
            raise ValueError(f"Engine needs seed= an int from 0 to 2**32 - 1, got {seed}")
        nonfinite.validate(on_nonfinite)
        plan.validate(mesh)
        if jax.process_count() > 1 and mesh.devices[0].platform == "cpu":
            yield_to_compute()
        self.mesh, self.plan = mesh, plan
        self.optimizer = as_optimizer(optimizer)
        if callable(loggers):
            raise TypeError("Engine needs loggers= a list of loggers, got one: write [logger]")
        self.loggers = tuple(loggers)
        self._given_precision = precision
        self.precision = precision if isinstance(precision, Precision) else Precision(precision)
        self.seed, self.on_nonfinite = number, on_nonfinite
        self._given_options = compiler_options
        if compiler_options is None:
            compiler_options = default_compiler_options(mesh.devices[0].platform)
        self._options = dict(compiler_options)
        self._steps: dict[Any, CompiledStep] = {}
        self.last_words = ""  # what is running, for a rank that waits in it
        ranks = {device.process_index for device in mesh.devices}
        self.spans = len(ranks) > 1  # several processes

    def __repr__(self) -> str:
        return format_call(
            "Engine",
            mesh=(self.mesh, None),
            plan=(self.plan, None),
            optimizer=(self.optimizer, None),
            loggers=(self.loggers, ()),
            precision=(self._given_precision, "float32"),
            seed=(self.seed, 0),
            on_nonfinite=(self.on_nonfinite, "stop"),
            compiler_options=(self._given_options, None),
        )

    def with_optimizer(self, optimizer: Any) -> "Engine":
        """Return an engine that differs in its optimizer alone, without loggers."""
        return Engine(
            mesh=self.mesh,
            plan=self.plan,
            optimizer=optimizer,
            precision=self.precision,
            seed=self.seed,
            on_nonfinite=self.on_nonfinite,
            compiler_options=self._options,
        )

    @property
    def compiler_options(self) -> dict[str, Any]:
        """XLA options of the steps."""
        return dict(self._options)

    @property
    def compile_seconds(self) -> float:
        """Seconds spent tracing and compiling steps so far."""
        return sum(step.seconds for step in self._steps.values())

    def create_state(
        self, params: Any, extra: Any = None, broadcast_from: int | None = None
    ) -> TrainState:
        """Copy parameters to the mesh and start the optimizer.

        In several processes the state is compared bit for bit before its first step: each has to
        make the same one, or to take that of one of them.

        Args:
          params: pytree of arrays; they are copied, yours stay alive. Of an equinox or nnx model
            it is the part that is trained: `eqx.partition`, `nnx.split`.
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
        if broadcast_from is not None:
            agreement.check_rank("create_state", "broadcast_from", broadcast_from)
        params, extra = copies(params, "params", trained=True), copies(extra, "extra")
        skips = self.on_nonfinite == "skip"
        arrays = {
            "step": np.zeros((), np.int32),
            "stored_params": params,
            "opt_state": copies(self.optimizer.init(params), "optimizer state"),
            "seed": np.asarray(self.seed, np.uint32),
            "extra": extra,
            "loss_scaling": loss_scale.start(
                1.0 if skips and self.precision.scaling is None else self.precision.scaling
            ),
        }
        if broadcast_from is not None and self.spans:
            agreement.check_broadcast(broadcast_from, arrays)
            root = self._first_device(broadcast_from)
            return TrainState(**digests.send_from(arrays, self.mesh.mesh, root), engine=self)
        placed = jax.tree.map(self._replicate, arrays)
        return TrainState(**placed, engine=self)

    def place(self, tree: Any, what: str) -> Any:
        """Return a pytree as arrays on the mesh, the same on every device; copy what is not there.

        Args:
          tree: pytree of arrays and numbers.
          what: what errors call it.

        Raises:
          TypeError: a leaf is no array.
        """
        there = self.mesh.sharding()

        def placed(path: Any, leaf: Any) -> Any:
            if isinstance(leaf, jax.core.Tracer):
                return leaf
            if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(there, leaf.ndim):
                return leaf
            where = f"{what}{jax.tree_util.keystr(path)}"
            return self._replicate(copies(leaf, where, user="state.replace"))

        return jax.tree_util.tree_map_with_path(placed, tree)

    def _first_device(self, rank: int) -> int:
        """Return the place in the mesh of a process's first device."""
        ranks = [device.process_index for device in self.mesh.devices]
        if rank not in ranks:
            raise ValueError(
                f"create_state needs broadcast_from= a rank with devices in the mesh, {ranks}, "
                f"got {rank}"
            )
        return ranks.index(rank)

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
          >>> engine = tx.Engine(mesh=tx.MeshSpec(jax.devices()[:2]), plan=tx.Plan(tx.DP("data")),
          ...                    optimizer=tx.optim.sgd(0.1))
          >>> report = engine.audit_broadcast(engine.create_state({"w": np.zeros(3, np.float32)}))
          >>> report.ok, {c.kind for c in report.collectives}
          (True, {'all-reduce'})
        """
        from txcore.profiling import audit

        self._check_own(state)
        agreement.check_rank("audit_broadcast", "broadcast_from", broadcast_from)
        mesh, root = self.mesh.mesh, self._first_device(broadcast_from)
        shapes = digests.sending_shapes(state.arrays, mesh)
        return audit(digests.sending_program(mesh, root), shapes)

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
          >>> engine = tx.Engine(mesh=tx.MeshSpec(jax.devices()[:2]), plan=tx.Plan(tx.DP("data")),
          ...                    optimizer=tx.optim.sgd(0.1))
          >>> state = engine.create_state({"w": np.zeros(3, np.float32)})
          >>> engine.check_replicas(state)
        """
        self._check_own(state)
        if self.spans:
            self._check_beginning(state, "check_replicas")
            watch.meet("a comparison of the copies of the state")
            watch.at("comparison")
        agreement.check_copies(state, self.mesh.mesh, after, since)
        watch.at("between steps")

    def _check_beginning(self, state: TrainState, name: str, batch: Any = None) -> None:
        """Compare a state over the ranks where it is not known to be equal on all of them."""
        if self.spans and not agreement.is_equal(state):
            watch.at("comparison", label=name)
            agreement.check_beginning(self, state, name, batch)
            agreement.note_equal(state)

    def _replicate(self, leaf: Any) -> jax.Array:
        if _compat.is_key_array(leaf):
            data = self._replicate(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        sharding = self.mesh.sharding()
        host = np.asarray(leaf)
        if jax.process_count() == 1:
            # device_put may alias an array that is there already, and a step donates it.
            return jnp.array(jax.device_put(host, sharding), copy=True)
        return jax.make_array_from_process_local_data(sharding, host, host.shape)

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
        refuse_tracing(name_of(step), state, batch)
        batch = shard_batch(batch, self.mesh, self.plan)
        compiled = self._compiled(step, state, batch, train=True)
        self._come_to(compiled, state, batch)
        arrays, metrics = compiled.call(state.arrays, batch)
        state = replace(state, **arrays)
        if self.spans:
            agreement.note_equal(state)
        return state, metrics

    def _come_to(self, compiled: CompiledStep, state: TrainState, batch: Any) -> None:
        """Do what several processes need before a program of all of them runs."""
        if self.spans:
            self._check_beginning(state, compiled.name, batch)
            if compiled.reduces:
                watch.meet(f"a run of {compiled.name}")

    def evaluate(self, step: Any, state: TrainState, data: Iterable[Any]) -> Metrics:
        """Average a step's metrics over batches, weighted by their real examples.

        Args:
          step: `(state, batch) -> metrics`, plain or decorated by `tx.step_fn`; each metric is
            a mean over the global batch (`tx.pmean` of `tx.example_mean`).
          state: the state; it is not donated.
          data: batches as for `run`; a leaf "mask" says which examples are real.

        Returns:
          The metrics as Python floats.

        Raises:
          ValueError: no batch, or a metric that still varies along an axis.
          TypeError: the step returns something else than a dict.
        """
        parts: list[Any] = []
        seen = 0
        for host in data:
            refuse_tracing(name_of(step), state, host)
            batch = shard_batch(host, self.mesh, self.plan)
            compiled = self._compiled(step, state, batch, train=False)
            self._come_to(compiled, state, batch)
            watch.at("eval step", label=compiled.last_words)
            metrics, count = compiled.call(state.arrays, batch)
            weight = int(count) if count is not None else examples(batch, self.plan)[0]
            if weight:  # a batch of padding alone has no mean
                parts.append(
                    jax.tree.map(lambda m, w=weight: w * np.asarray(m, np.float64), metrics)
                )
                seen += weight
        watch.at("between steps")
        if not seen:
            raise ValueError("engine.evaluate needs at least one real example, got none in data")
        return jax.tree.map(lambda *part: (sum(part) / seen).tolist(), *parts)

    def fit(
        self,
        step: StepFn,
        state: TrainState,
        data: loop.Data,
        *,
        steps: int | None = None,
        epochs: int | None = None,
        evaluate: loop.Evaluate | None = None,
        eval_every: int | None = None,
        checkpoints: Checkpoints | None = None,
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
        return loop.fit(
            self,
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
          >>> engine = tx.Engine(mesh=tx.MeshSpec(jax.devices()[:2]), plan=tx.Plan(tx.DP("data")),
          ...                    optimizer=tx.optim.sgd(0.1))
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
        if target is not None and mesh is not None:
            return self._audit_on_target(step, state, batch, target, mesh)
        batch = shard_batch(batch, self.mesh, self.plan)
        return self._report(self._compiled(step, state, batch, train=True), state)

    def _audit_on_target(
        self, step: StepFn, state: TrainState, batch: Any, target: str, sizes: Mapping[str, int]
    ) -> "Report":
        from txcore.profiling.targets import parse_target

        self._check_own(state)
        check_jit(name_of(step))
        machine = parse_target(target)
        devices = machine.mesh(sizes).devices.flat
        there = Engine(
            mesh=MeshSpec(list(devices), tuple(sizes), tuple(sizes.values())),
            plan=self.plan,
            optimizer=self.optimizer,
            precision=self.precision,
            seed=self.seed,
            on_nonfinite=self.on_nonfinite,
            compiler_options=self._given_options,
        )
        arrays = {name: shapes_on(x, there.mesh) for name, x in state.arrays.items()}
        state = TrainState(**arrays, engine=there)
        compiled = compile_step(
            step.fn if isinstance(step, StepFn) else step,
            state,
            global_shapes(batch, there.mesh, self.plan),
            mesh=there.mesh,
            plan=there.plan,
            options={**there._options, **machine.compiler_options},
            train=True,
        )
        return replace(there._report(compiled, state), target=target)

    def _report(self, compiled: CompiledStep, state: TrainState) -> "Report":
        # Not needed to train: see compile.py.
        from txcore.profiling.audit import audit_program
        from txcore.profiling.declared.gradient_factors import read_gradient_factors
        from txcore.profiling.matching.against_plan import against_plan

        report = audit_program(compiled.program)
        if self.optimizer.per_example:  # gathers what the plan would have averaged
            return report
        factors = read_gradient_factors(compiled.program.jaxpr, self.plan.data_axes)
        return against_plan(report, self.plan.predict(state.stored_params, self.mesh), factors)

    def _check_own(self, state: TrainState) -> None:
        if not isinstance(state, TrainState) or state.engine is not self:
            raise ValueError("this engine runs states that its create_state made, got another")

    def check_state(self, state: TrainState, user: str) -> None:
        """Refuse a state that this engine did not make, or that a step has used up."""
        self._check_own(state)
        if state.step.is_deleted():
            raise ValueError(
                f"the state given to {user} was donated to an earlier step: keep the "
                "state that the step returns, state, metrics = step(state, batch)"
            )

    def _compiled(self, step: Any, state: TrainState, batch: Any, *, train: bool) -> CompiledStep:
        """Return the step compiled for these shapes; compile it the first time."""
        fn = step.fn if isinstance(step, StepFn) else step
        self.check_state(state, name_of(fn))
        key = (train, fn, _signature(state.arrays), _signature(batch))
        compiled = self._steps.get(key)
        if compiled is None:
            check_jit(name_of(fn))
            watch.at("compile", label=name_of(fn))
            compiled = compile_step(
                fn,
                state,
                batch,
                mesh=self.mesh,
                plan=self.plan,
                options=self._options,
                train=train,
                together=self.spans,
            )
            self._steps[key] = compiled
            watch.at("step" if train else "eval step", label=compiled.last_words)
        if train:
            self.last_words = compiled.last_words
        return compiled


def _signature(tree: Any) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple((x.shape, x.dtype) for x in leaves)
