"""What an engine shows of its steps and states: their proofs, and whether copies are equal."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from txcore.kernels.common.checks import whole_number
from txcore.mesh import MeshSpec
from txcore.train.options import OptionsView
from txcore.train.state import placing
from txcore.train.state.owner import Owner
from txcore.train.state.state import TrainState
from txcore.train.steps import proof
from txcore.train.steps.step_fn import StepFn
from txcore.train.steps.steps import Steps

if TYPE_CHECKING:
    from txcore.profiling import Report
    from txcore.profiling.costs import Costs
    from txcore.train.options import Options
    from txcore.train.steps.compile import CompiledStep


class Proofs(OptionsView):
    """The part of an engine that runs no step."""

    _steps: Steps
    _owner: Owner

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

    def audit(
        self,
        step: StepFn,
        state: TrainState,
        batch: Any,
        *,
        target: str | None = None,
        mesh: Mapping[str, int] | None = None,
        steps_per_call: int | None = None,
    ) -> "Report":
        """Account for every collective of the compiled step, here or on another machine.

        Args:
          step: the training step.
          state: a state that this engine made; it is not used up.
          batch: a batch as for `run`; with `target` one data shard of it, as arrays or shapes.
          target: a machine to compile for, which need not be here: "tpu:v5p:16x16x16",
            "cuda:h100:64x8" (hosts x GPUs), "cpu:8".
          mesh: the target's axes and their sizes, `{"data": 512}`; needed with `target`.
          steps_per_call: how many steps the program makes, as `run_many` and `fit(steps_per_call=)`
            run them; None for the program of `run`.

        Returns:
          A `txcore.profiling.Report`; `report.status` is the answer.

        Raises:
          ValueError: no such target, a mesh that does not fit it or the plan, or a count below 1.
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
        per_call = whole_number(steps_per_call)
        if steps_per_call is not None and (per_call is None or per_call < 1):
            raise ValueError(
                f"engine.audit needs steps_per_call= a count from 1 on, got {steps_per_call!r}"
            )
        compiled, state, options = self._compile(
            "audit", step, state, batch, target, mesh, per_call
        )
        report = proof.report_on(compiled, state, options)
        return report if target is None else replace(report, target=target)

    def costs(
        self,
        step: StepFn,
        state: TrainState,
        batch: Any,
        *,
        target: str | None = None,
        mesh: Mapping[str, int] | None = None,
    ) -> "Costs":
        """Count what the compiled step sends, stores and computes, here or on another machine.

        Args:
          step: the training step.
          state: a state that this engine made; it is not used up.
          batch: as for `audit`.
          target: as for `audit`. Only TPU and GPU targets have predicted times.
          mesh: the target's axes and their sizes; needed with `target`.

        Returns:
          The `txcore.profiling.costs.Costs` of one call on each device.

        Raises:
          ValueError, TypeError, ImportError, RuntimeError: as for `audit`.

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
          >>> found = engine.costs(step, state, np.ones((4, 3), np.float32))
          >>> [(total.kind, total.payload_bytes) for total in found.totals]
          [('all-reduce', 16)]
        """
        from txcore.profiling.costs import costs_of

        compiled, _, _ = self._compile("costs", step, state, batch, target, mesh, None)
        program = compiled.program
        return costs_of(program if target is None else replace(program, target=target))

    def _compile(
        self,
        asked: str,
        step: StepFn,
        state: TrainState,
        batch: Any,
        target: str | None,
        mesh: Mapping[str, int] | None,
        per_call: int | None,
    ) -> "tuple[CompiledStep, TrainState, Options]":
        """Compile a step; return it, a state that it takes, and the options that it is under."""
        if (target is None) != (mesh is None):
            raise TypeError(
                f"engine.{asked} needs target= and mesh= together, as target='cuda:h100:8', "
                f"mesh={{'data': 8}}, got {target=}, {mesh=}"
            )
        if target is None or mesh is None:
            compiled, state = proof.compile_here(self._steps, step, state, batch, per_call)
            return compiled, state, self._steps.options
        from txcore.profiling.targets import parse_target

        self._steps.check_own(state)
        machine = parse_target(target)
        devices = list(machine.mesh(mesh).devices.flat)
        there = MeshSpec(devices, tuple(mesh), tuple(mesh.values()))
        engine = type(self)(**vars(replace(self._options, mesh=there)))
        compiled, state = proof.compile_there(
            engine._options, engine._owner, machine, step, state, batch, per_call
        )
        return compiled, state, engine._options
