"""A model of stacked layers, with one step for every plan, and float64 NumPy beside it."""

import jax
import jax.numpy as jnp
import numpy as np

import txcore as tx

WORDS, WIDTH, LAYERS, ROWS, LENGTH = 11, 8, 8, 16, 3
RULES = {"*/w": -1, "*/b": -1, "*/u": -2}


def init(layers=LAYERS, dtype=np.float32):
    """Return parameters under every plan: layers that all differ, and unlike ends."""
    rng = np.random.default_rng(1)
    shapes = {"w": (WIDTH, 2 * WIDTH), "b": (2 * WIDTH,), "u": (2 * WIDTH, WIDTH)}
    blocks = {n: rng.normal(0, 0.2, (layers, *s)).astype(dtype) for n, s in shapes.items()}
    ends = {n: rng.normal(0, 0.5, (WORDS, WIDTH)).astype(dtype) for n in ("embed", "head")}
    return {**ends, "blocks": blocks}


def make_batch(seed=0, rows=ROWS, *, mask="tokens"):
    rng = np.random.default_rng(seed)
    names = ("word", "next")
    batch = {n: rng.integers(0, WORDS, (rows, LENGTH)).astype(np.int32) for n in names}
    if mask:
        shape = (rows, LENGTH) if mask == "tokens" else (rows,)
        real = rng.random(shape) < np.linspace(0.3, 0.9, rows).reshape(-1, *[1] * (len(shape) - 1))
        batch["real" if mask == "tokens" else "mask"] = real.astype(np.float32)
    return batch


def first(params, batch):
    return params["embed"][batch["word"]]


def block(params, x, batch, stage):
    for w, b, u in zip(params["w"], params["b"], params["u"], strict=True):
        inner = tx.vary(x, "model", name="x")
        x = x + tx.psum(jnp.tanh(inner @ w + b) @ u, "model", name="out")
    return x


def last(params, x, batch):
    log_p = jax.nn.log_softmax(x @ params["head"].T)
    losses = -jnp.take_along_axis(log_p, batch["next"][..., None], -1)[..., 0]
    return losses, {"hits": jnp.argmax(log_p, -1) == batch["next"]}


def mask_of(batch):
    return batch.get("real", batch.get("mask"))


def cast_functions(precision):
    """Return the three functions, each of which computes in the precision's dtype."""

    def first_cast(params, batch):
        return first(precision.cast(params), batch)

    def block_cast(params, x, batch, stage):
        return block(precision.cast(params), x, batch, stage)

    def last_cast(params, x, batch):
        losses, aux = last(precision.cast(params), x, batch)
        return losses.astype(jnp.float32), aux

    return first_cast, block_cast, last_cast


@tx.step_fn
def step(state, batch):
    functions = cast_functions(state.precision)
    run = tx.pipeline.value_and_grad(*functions, has_aux=True, loss_scale=state.loss_scale)
    (loss, aux), grads = run(state.params, batch, mask=mask_of(batch))
    grads, state = state.sync_gradients(grads)
    metrics = tx.pmean({"loss": loss, **aux}, "data")
    return state.apply_gradients(grads=grads), metrics


def eval_step(state, batch):
    run = tx.pipeline.evaluate(*cast_functions(state.precision), has_aux=True)
    mask = mask_of(batch)
    loss, aux = tx.pmean(run(state.params, batch, mask=mask), "data")
    if mask is None:
        return {"loss": loss, **aux}
    real = tx.psum(jnp.sum(mask), "data")
    return {"loss": tx.Mean(loss * real, real), "hits": tx.Mean(aux["hits"] * real, real)}


def make_plan(*, dp=None, tp=True, pp=None):
    """Return a plan over the axes "data", "model" and "pipe", which every mesh here has."""
    return tx.Plan(
        data_parallel=tx.DP("data", **(dp or {})),
        tensor_parallel=tx.TP("model", rules=RULES) if tp else None,
        pipeline=None if pp is None else tx.PP("pipe", **{"microbatches": 4, **pp}),
    )


def make_engine(plan, data=1, model=1, pipe=1, **options):
    count = data * model * pipe
    mesh = tx.MeshSpec(jax.devices()[:count], ("data", "model", "pipe"), (data, model, pipe))
    options.setdefault("optimizer", tx.optim.adamw(0.01))
    return tx.Engine(mesh=mesh, plan=plan, **options)


def train(engine, steps=4, *, mask="tokens", step=step, state=None, start=0):
    """Return the state and the losses after some steps."""
    state = engine.create_state(init()) if state is None else state
    losses = []
    for i in range(start, start + steps):
        state, metrics = engine.run(step, state, make_batch(i, mask=mask))
        losses.append(float(metrics["loss"]))
    return state, losses


def params_of(state):
    """Return a state's parameters with the layers stacked, whatever its plan."""
    params = jax.device_get(state.stored_params)
    like = init()
    return jax.tree.map(lambda x, one: np.reshape(x, one.shape), params, like)
