"""Plans: what is parallel over which mesh axis."""

import html
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from txcore.layout import Layout, axes_of, drop_axes
from txcore.mesh import MeshSpec
from txcore.optim import Optimizer, as_optimizer
from txcore.optim.optimizer import Exchanges
from txcore.parallel import local_sgd
from txcore.parallel.gradients.buckets import BucketLayout
from txcore.parallel.gradients.compression import as_compression
from txcore.parallel.predicted import Predicted
from txcore.plan.batch_specs import axes_of_one_device, batch_specs
from txcore.plan.checks import (
    axes_by_kind,
    check_adasum,
    check_axes,
    check_kinds,
    check_shards_in_stages,
    check_together,
)
from txcore.plan.data_parallel import DP
from txcore.plan.keep import keep_all
from txcore.plan.pipeline_parallel import PP
from txcore.plan.predict_buckets import choose_exchange
from txcore.plan.predict_step import predict_step
from txcore.plan.rules import split_chunks, stored_specs
from txcore.plan.shards import shard_spec
from txcore.plan.tensor_parallel import TP
from txcore.printing import format_call

if TYPE_CHECKING:
    from txcore.plan.description import Description


@dataclass(frozen=True, kw_only=True)
class Plan:
    """State what is parallel over which mesh axis.

    Args:
      data_parallel: `DP(axis)`, or None for a step that every device computes whole.
      tensor_parallel: `TP(axis, rules=)`, which parameters are split for the layers of `tx.tensor`.
      pipeline: `PP(axis, microbatches=)`, for `tx.pipeline.value_and_grad`: the layers that are
        stacked in `params["blocks"]` lie on the devices along that axis.
      context: mesh axis name over which the sequence, dim 1 of the batch's leaves, is split, for
        `tx.context.ring_attention`. Gradients are averaged over it too, as over a data axis. What
        has one dim (a mask of examples) is the same along it; a leaf whose dim 1 is no sequence is
        declared by `batch=`.
      params: specs for parameters that are stored in parts, `{"mlp/w1": P(None, "model")}`, by
        path: its keys with slashes between them, and * for any characters. The first rule that
        matches counts; what none matches is stored whole. Inside the step each device holds its
        part, and the step's own collectives make one result of the parts.
      batch: specs for leaves of the batch that are not simply sharded over the data axes in
        their first dim (and over `context` in their second): `{"x": P("data", "model")}`, by the
        leaf's top-level key.

    Example:
      >>> plan = tx.Plan(data_parallel=tx.DP(axis="data"))
      >>> plan.data_axes
      ('data',)
    """

    data_parallel: DP | None = None
    tensor_parallel: TP | None = None
    pipeline: PP | None = None
    context: str | None = None
    params: Mapping[str, P] = field(default_factory=dict)
    batch: Mapping[str, P] = field(default_factory=dict)

    def __new__(cls, *args: Any, **options: Any) -> "Plan":
        """Refuse positional arguments, which say nothing of what they are."""
        if args:
            raise TypeError(
                f"Plan takes keywords alone, got {', '.join(map(repr, args))}: write "
                f"tx.Plan(data_parallel={args[0]!r})"
            )
        return super().__new__(cls)

    def __repr__(self) -> str:
        return format_call("Plan", **{name: (value, None) for name, value in self._given.items()})

    def _repr_html_(self) -> str:
        lines = [f"    {name}={value!r}," for name, value in self._given.items()]
        return f"<pre>{html.escape(chr(10).join(['Plan(', *lines, ')']))}</pre>"

    @property
    def _given(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value}

    def __post_init__(self) -> None:
        check_kinds(self, {"data_parallel": DP, "tensor_parallel": TP, "pipeline": PP})
        check_axes(self)
        check_together(self)

    @property
    def sync_options(self) -> dict[str, Any]:
        """The options with which a step's `state.sync_gradients` averages."""
        dp = self.data_parallel
        if dp is None:
            return {}
        options = {"reduction": dp.reduction, "delay": dp.delay, "buckets": dp.buckets}
        compression = as_compression("DP", dp.compression)
        return {**options, "algorithm": dp.algorithm, "compression": compression}

    def rounds(self, mesh: MeshSpec) -> local_sgd.Rounds | None:
        """Return how local SGD averages parameters; None where gradients are reduced."""
        dp = self.data_parallel
        if dp is None or dp.sync_every == 1:
            return None
        return local_sgd.Rounds(dp.sync_every, dp.outer, self.active_data_axes(mesh))

    @property
    def row_axes(self) -> tuple[str, ...]:
        """The axes over which the rows of the batch are split: data parallelism's."""
        return self.data_parallel.axes if self.data_parallel is not None else ()

    @property
    def data_axes(self) -> tuple[str, ...]:
        """The axes over which the batch is sharded and gradients are averaged: `context` too."""
        return self.row_axes if self.context is None else (*self.row_axes, self.context)

    def validate(self, mesh: MeshSpec) -> None:
        """Refuse a plan that `mesh` cannot run.

        What no mesh could run is refused when the plan is made, and what a model's parameters do
        not allow by `layouts`: all of it before anything is compiled.

        Raises:
          ValueError: an axis that `mesh` does not have, with those that it has; a number of
            devices along one; or shard="gradients" in stages.
        """
        for option, axis in axes_by_kind(self):
            mesh.check_axis(axis, f"Plan({option}={getattr(self, option)!r})")
        for option, specs in (("params", self.params), ("batch", self.batch)):
            for key, spec in specs.items():
                for axis in axes_of(spec):
                    mesh.check_axis(axis, f"Plan({option}={{{key!r}: ...}})")
        check_adasum(self, mesh.shape)
        check_shards_in_stages(self, mesh.shape)

    def active_data_axes(self, mesh: MeshSpec) -> tuple[str, ...]:
        """Return the data axes that have more than one device."""
        return tuple(a for a in self.data_axes if mesh.shape[a] > 1)

    def as_stored(self, params: Any) -> Any:
        """Return parameters in the shapes in which a state stores them, as `create_state` does.

        These are their own, but for the layers of a pipeline with several chunks on a stage:
        `params["blocks"]`, (layers, ...), becomes (chunks, layers / chunks, ...).

        Args:
          params: pytree of arrays or shapes.

        Raises:
          ValueError: the chunks do not divide the layers.

        Example:
          >>> pp = tx.PP("pipe", microbatches=4, schedule="interleaved", chunks=2)
          >>> tx.Plan(pipeline=pp).as_stored({"blocks": np.zeros((8, 3))})["blocks"].shape
          (2, 4, 3)
        """
        return split_chunks(self.pipeline, params)

    def layouts(self, params: Any, mesh: MeshSpec) -> Any:
        """Return how each parameter lies on the mesh, and how its gradient arrives.

        Args:
          params: pytree of the parameters, arrays or shapes, each of them whole.
          mesh: the devices and their axes.

        Returns:
          A pytree of `txcore.layout.Layout` with the structure of `params`.

        Raises:
          ValueError: the plan names an axis that `mesh` does not have, or a rule of `params=`
            matches nothing or does not fit a parameter that it matches.

        Example:
          >>> plan = tx.Plan(data_parallel=tx.DP("data"), params={"mlp/w*": P(None, "model")})
          >>> mesh = tx.MeshSpec(jax.devices()[:4], axes=("data", "model"), shape=(2, 2))
          >>> params = {"mlp": {"w1": np.zeros((3, 4)), "b": np.zeros(4)}}
          >>> layouts = plan.layouts(params, mesh)["mlp"]
          >>> layouts["w1"].stored_axes, layouts["w1"].reduced, layouts["b"].stored_axes
          (('model',), ('data',), ())
        """
        self.validate(mesh)
        reduced = self.active_data_axes(mesh)
        alone = axes_of_one_device(mesh)

        def layout(stored: P, leaf: Any) -> Layout:
            active = drop_axes(stored, alone)
            parts = shard_spec(self.data_parallel, active, np.shape(leaf), mesh)
            shards_all = self.data_parallel is not None and self.data_parallel.shard == "parameters"
            return Layout(parts if shards_all else active, gradient=parts, reduced=reduced)

        stored = stored_specs(self.params, params, mesh, self.tensor_parallel, self.pipeline)
        return jax.tree.map(layout, stored, params)

    def bucket_layout(self, params: Any, mesh: MeshSpec) -> BucketLayout:
        """Return the buckets in which gradients are exchanged; empty where XLA combines them.

        Args:
          params: pytree of the parameters, arrays or shapes, each of them whole.
          mesh: the devices and their axes.

        Returns:
          The buckets in order, a tuple; `str` has a line for each.

        Example:
          >>> params = {"w": np.zeros((512, 512), np.float32), "b": np.zeros(512, np.float32)}
          >>> plan = tx.Plan(data_parallel=tx.DP("data", buckets=1))
          >>> print(plan.bucket_layout(params, tx.MeshSpec(jax.devices()[:2], axes=("data",))))
          0: 1.00 MiB, float32 over data: 1 leaves, w
          1: 0.00 MiB, float32 over data: 1 leaves, b
        """
        shapes = jax.eval_shape(lambda tree: tree, params)
        chosen = choose_exchange(shapes, self.layouts(shapes, mesh), mesh, self.data_parallel)
        return BucketLayout(bucket for bucket, _ in chosen)

    def kept(self, params: Any, mesh: MeshSpec, optimizer: Optimizer) -> Any:
        """Return what communication keeps from step to step, as `state.comm_state` does.

        Args:
          params: pytree of the parameters, arrays or shapes, each of them whole.
          mesh: the devices and their axes.
          optimizer: the engine's, whose state local SGD keeps for each device.

        Returns:
          A pytree of `txcore.kept.Kept`, by what keeps it; None where nothing is kept.
        """
        return keep_all(self, params, mesh, optimizer)

    def predict(
        self,
        params: Any,
        mesh: MeshSpec,
        *,
        clips: bool = False,
        skips: bool = False,
        exchanges: Exchanges | None = None,
        activation: Any = None,
    ) -> tuple[Predicted, ...]:
        """Predict what the plan itself makes a training step communicate.

        The loss, metrics and whatever else a step reduces come on top.

        Args:
          params: pytree of the parameters, arrays or `jax.ShapeDtypeStruct`s. Gradients have
            their dtypes, whatever the precision policy computes in (see `tx.Precision`), and
            float16 is averaged as float32; integers have none.
          mesh: the devices and their axes.
          clips: whether the optimizer takes the gradients' global norm (`clip_norm=`).
          skips: whether a step with gradients that are not finite changes nothing (in float16, and
            with `Engine(on_nonfinite="skip")`).
          exchanges: what the optimizer sends besides (`Optimizer.exchanges`).
          activation: of a pipeline, the `jax.ShapeDtypeStruct` (or a pytree of them) of what one
            device sends to the next of one microbatch; None leaves its permutes out.

        Returns:
          For data parallelism one all-reduce of the gradients over the data axes for each dtype,
          of a parameter's part where it is stored in parts; with `buckets` and `algorithm` what is
          sent of each bucket; with `sync_every` one of the parameters in one step of so many; with
          Adasum or a compression what that sends. For parameters in parts also one of the squared
          norm, where the optimizer `clips`, and one of whether all are finite, where the step
          `skips`. For a pipeline its permutes, over all ticks of a step, and the sums over its
          stages of the loss and of the gradients of what all stages have. Nothing over axes of one
          device.

        Raises:
          ValueError: as `layouts`.

        Example:
          >>> mesh = tx.MeshSpec(jax.devices()[:2], axes=("data",))
          >>> params = {"w": np.zeros((3, 4), np.float32), "b": np.zeros(4, np.float32)}
          >>> for p in tx.Plan(data_parallel=tx.DP("data")).predict(params, mesh):
          ...     print(p.what, p.kind, p.axes, p.dtype, p.elements, p.payload_bytes)
          gradients all-reduce ('data',) float32 (4, 12) 64
        """
        return predict_step(
            self,
            params,
            mesh,
            clips=clips,
            skips=skips,
            exchanges=exchanges,
            activation=activation,
        )

    def describe(
        self,
        params: Any,
        mesh: MeshSpec,
        *,
        optimizer: Any = None,
        activation: Any = None,
    ) -> "Description":
        """Describe what this plan makes of a model and a mesh, before anything is compiled.

        Args:
          params: pytree of the parameters, arrays or shapes, each of them whole.
          mesh: the devices and their axes.
          optimizer: the engine's, for its state and what it sends; None leaves them out.
          activation: shape and dtype of what a pipeline's stage hands to the next for one
            microbatch on one device, for what waits in its slots; None leaves it out.

        Returns:
          A `Description`: `print` shows the mesh, a table of the parameters (stored how, what a
          device holds, what becomes of the gradient), the collectives of a step with their bytes,
          a device's memory, and the pipeline's bubble; in a notebook with a drawing (`to_svg`).

        Raises:
          ValueError: as `layouts`.

        Example:
          >>> plan = tx.Plan(tensor_parallel=tx.TP("model", rules={"up": -1, "down": -2}))
          >>> params = {"up": np.zeros((4, 8)), "down": np.zeros((8, 4)), "b": np.zeros(4)}
          >>> mesh = tx.MeshSpec(jax.devices()[:2], axes=("model",))
          >>> described = plan.describe(jax.tree.map(np.float32, params), mesh)
          >>> [(row.path, row.part) for row in described.parameters]
          [('b', (4,)), ('down', (4, 4)), ('up', (4, 4))]
          >>> described.memory["parameters"]
          144
        """
        optimizer = None if optimizer is None else as_optimizer(optimizer)
        from txcore.plan.describe import describe  # few that make a plan print one

        return describe(self, params, mesh, optimizer, activation)

    def batch_specs(self, batch: Any, mesh: MeshSpec) -> Any:
        """Return the spec of each leaf of `batch`, with axes of size 1 left out.

        Raises:
          ValueError: `batch=` declares a key that the batch does not have.
        """
        return batch_specs(self, batch, mesh)
