"""Engines, steps and runs for any composition of data, context, pipe and model."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import composed_models as models
import jax
import jax.numpy as jnp
import numpy as np

import txcore as tx

SCHEDULES = ("gpipe", "1f1b", "zb-h1", "interleaved")
# Of one program each: to compile them well would take longer than to run them.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclass(frozen=True)
class Case:
    """Hold one composition.

    Attributes:
      model: "mlp", "cnn" or "gpt".
      data: devices along each axis, as all of the next.
      context: as above.
      pipe: as above.
      mp: devices along "model".
      schedule: of the pipeline.
      deep: how many layers each chunk has.
      dp: options of `tx.DP`.
      optimizer: its name.
      precision: of the engine.
    """

    model: str = "gpt"
    data: int = 1
    context: int = 1
    pipe: int = 1
    mp: int = 1
    schedule: str = "1f1b"
    deep: int = 1
    dp: tuple[tuple[str, Any], ...] = ()
    optimizer: str = "momentum"
    precision: str = "float32"

    def __str__(self):
        sizes = f"{self.model}-d{self.data}c{self.context}p{self.pipe}m{self.mp}"
        of_pipe = f"-{self.schedule}" if self.pipe > 1 else ""
        deep = f"-{self.deep} deep" if self.deep > 1 else ""
        options = "".join(f"-{value}" for _, value in self.dp)
        return sizes + of_pipe + deep + options + f"-{self.optimizer}-{self.precision}"

    @property
    def devices(self):
        return self.data * self.context * self.pipe * self.mp

    @property
    def chunks(self):
        return 2 if self.schedule == "interleaved" else 1

    @property
    def layers(self):
        return max(2, self.pipe * self.chunks * self.deep)

    @property
    def microbatches(self):
        return 2 * self.pipe if self.pipe > 1 else 2

    def make_model(self, **options):
        return models.MODELS[self.model](self.layers, **options)

    def on_one_device(self):
        """Return the same model and training on one device, float32, nothing split or lossy."""
        keep = {"deep": self.layers, "schedule": "gpipe", "optimizer": self.optimizer}
        return Case(self.model, **keep)

    def make_engine(self, model, **options):
        has_pipe = self.model != "cnn"
        options.setdefault("optimizer", OPTIMIZERS[self.optimizer]())
        options.setdefault("compiler_options", QUICKLY)
        pipeline = {"microbatches": self.microbatches, "schedule": self.schedule}
        return tx.Engine(
            mesh=tx.MeshSpec(
                jax.devices()[: self.devices],
                models.AXES,
                (self.data, self.context, self.pipe, self.mp),
            ),
            plan=tx.Plan(
                data_parallel=tx.DP("data", **dict(self.dp)),
                tensor_parallel=tx.TP("model", rules=model.rules),
                pipeline=tx.PP("pipe", **pipeline, chunks=self.chunks) if has_pipe else None,
                context="context" if model.sequence else None,
            ),
            precision=self.precision,
            **options,
        )


OPTIMIZERS = {
    "momentum": lambda: tx.optim.sgd(0.05, momentum=0.9),
    "adamw": lambda: tx.optim.adamw(3e-3),
    "clipped": lambda: tx.optim.sgd(0.05, momentum=0.9, clip_norm=0.5),
}


def prepare(model):
    """Return what gives each engine the tokens in its order."""

    def order(batch, engine):
        n = engine.mesh.shape["context"]
        return {
            key: tx.context.split_chunks(leaf, n) if n > 1 and key in model.sequence else leaf
            for key, leaf in batch.items()
        }

    return order


def reduced(model, value, name):
    """Return the global mean of what varies along the axes that share the batch."""
    return tx.pmean(value, ("data", "context") if model.sequence else "data", name=name)


def make_step(model, fault=None):
    """Return a training step; `fault(state, grads) -> (grads, state)` reduces them otherwise."""

    @tx.step_fn
    def step(state, batch):
        loss, grads = differentiate(model, state, batch)
        grads, state = (fault or (lambda state, grads: state.sync_gradients(grads)))(state, grads)
        return state.apply_gradients(grads=grads), {"loss": reduced(model, loss, "loss")}

    return step


def differentiate(model, state, batch):
    if len(model.functions) == 3:
        functions = cast_functions(state, model.functions)
        both = tx.pipeline.value_and_grad(*functions, loss_scale=state.loss_scale)
        return both(state.params, batch, mask=batch["mask"])
    (losses_of,) = model.functions

    def loss_of(params, batch):
        losses = losses_of(state.precision.cast(params), batch)
        return tx.example_mean(losses.astype(jnp.float32), batch["mask"], axis="data")

    both = tx.value_and_grad(loss_of, microbatches=2, loss_scale=state.loss_scale)
    return both(state.params, batch)


def cast_functions(state, functions):
    """Return a model's functions that compute in the engine's precision."""
    cast = state.precision.cast
    first, block, last = functions
    return (
        lambda params, batch: first(cast(params), batch),
        lambda params, x, batch, stage: block(cast(params), x, batch, stage),
        lambda params, x, batch: last(cast(params), x, batch).astype(jnp.float32),
    )


def make_eval_step(model):
    def evaluate(state, batch):
        if len(model.functions) == 3:
            functions = cast_functions(state, model.functions)
            loss = tx.pipeline.evaluate(*functions)(state.params, batch, mask=batch["mask"])
        else:
            losses = model.functions[0](state.precision.cast(state.params), batch)
            loss = tx.example_mean(losses, batch["mask"], axis="data")
        return {"loss": reduced(model, loss, "loss")}

    return evaluate


@dataclass(frozen=True)
class Result:
    """Hold what a run made: gradients of its first step, losses of all, the loss it ends with."""

    grads: Any
    losses: np.ndarray
    evaluated: float


STEPS = 20


def run(case, steps=STEPS):
    """Train a few steps under a plan, and evaluate."""
    from txcore.parity.plans import _record_gradients

    model = case.make_model()
    plain = case.make_engine(model)
    # Compression gives the optimizer what it made of the gradients, which is theirs no more.
    engine = _record_gradients(plain)
    state = engine.create_state(model.params)
    step, losses, grads = make_step(model), [], None
    for i in range(steps):
        batch = prepare(model)(model.make_batch(i), engine)
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
        if i == 0:
            grads = jax.tree.map(np.asarray, state.opt_state["grads"])
    batches = [prepare(model)(model.make_batch(i), engine) for i in (0, 101)]
    evaluated = engine.evaluate(make_eval_step(model), state, batches)["loss"]
    grads = jax.tree.map(lambda g, p: g.reshape(p.shape), grads, model.params)
    return Result(grads, np.array(losses, np.float64), float(evaluated))


def run_one_device(case):
    """Return the run of a case's model on one device, made once for all cases that share it."""
    return _run_once(case.on_one_device())


@functools.cache
def _run_once(case):
    return run(case)


def true_gradients(case):
    """Return the gradients of the first step on one device in float64, by jax.grad."""
    return _differentiate_once(case.on_one_device())


@functools.cache
def _differentiate_once(case):
    model = case.make_model()
    wide = {np.float32: np.float64}
    batch = {
        k: leaf.astype(wide.get(leaf.dtype.type, leaf.dtype))
        for k, leaf in model.make_batch(0).items()
    }

    def mean_loss(params):
        def alone(params, batch):
            if len(model.functions) == 1:
                losses = model.functions[0](params, batch)
            else:
                first, block, last = model.functions
                ends = {name: leaf for name, leaf in params.items() if name != "blocks"}
                x = block(params["blocks"], first(ends, batch), batch, 0)
                losses = last(ends, x, batch)
            return jnp.sum(losses * batch["mask"]) / jnp.sum(batch["mask"])

        return alone(params, batch)

    with jax.enable_x64(True):
        params = jax.tree.map(lambda w: np.asarray(w, np.float64), model.params)
        mesh = jax.sharding.Mesh(
            np.array(jax.devices()[:1], dtype=object).reshape(1, 1, 1, 1), models.AXES
        )
        spec = jax.sharding.PartitionSpec()
        alone = jax.shard_map(jax.grad(mean_loss), mesh=mesh, in_specs=spec, out_specs=spec)
        return jax.tree.map(np.asarray, jax.jit(alone, compiler_options=QUICKLY)(params))


def largest_error(found, expected):
    """Return the largest difference of any leaf, relative to its largest element."""
    errors = jax.tree.map(
        lambda a, b: float(np.max(np.abs(np.asarray(a, np.float64) - b)) / np.max(np.abs(b))),
        *(found, expected),
    )
    return max(jax.tree.leaves(errors))


def list_all():
    """Return every composition of 1, 2, 4 and 8 devices along each axis, 8 in all at most."""
    sizes = [1, 2, 4, 8]
    found = []
    for data, context, pipe, mp in (
        (d, c, p, m) for d in sizes for c in sizes for p in sizes for m in sizes
    ):
        if data * context * pipe * mp > 8:
            continue
        for schedule in SCHEDULES if pipe > 1 else ("gpipe",):
            for model in ("mlp", "gpt", "cnn"):
                if (context > 1 and model != "gpt") or (pipe > 1 and model == "cnn"):
                    continue
                found.append(Case(model, data, context, pipe, mp, schedule))
    return found


def with_options(case, **options):
    dp = tuple(sorted(options.pop("dp", {}).items()))
    return replace(case, dp=dp, **options)
