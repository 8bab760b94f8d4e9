"""Steps that are right on any number of devices, each with its truth: none may be refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from guard_data import (
    EXTRA,
    GRAD,
    MASK,
    PARAMS,
    SQUARES,
    TOKEN_MASK,
    TOKENS,
    WEIGHTS,
    X,
    Y,
    errors,
    f64,
    mse,
    updated,
    weighted,
)
from jax import lax

import txcore as tx

RIGHT: dict[str, Any] = {}  # name: (step, metrics, parameters, extra, axes)
SCALAR = jax.ShapeDtypeStruct((), jnp.float32)
LOSS = float(SQUARES.mean())


def right(metrics=None, params=None, extra=None, axes=("data",)):
    def add(step):
        truth = metrics or {}, params or updated(), {**EXTRA, **(extra or {})}
        RIGHT[step.__name__] = (step, *truth, axes)
        return step

    return add


def local(state, batch, f=mse):
    return tx.value_and_grad(f)(state.params, batch)


def finish(state, grads, **metrics):
    return state.apply_gradients(grads=grads), metrics


def gradient_of(f):
    """A step of the gradients that `f(state, batch)` makes."""
    return lambda state, batch: finish(state, f(state, batch))


def measure(f):
    """A step that trains as usual, and reports f(state, batch, grads) as a metric."""

    def step(state, batch):
        grads = tx.pmean(local(state, batch)[1], "data")
        return finish(state, grads, m=f(state, batch, grads))

    return step


@right({"loss": LOSS})
def pmean_of_both(state, batch):
    loss, grads = local(state, batch)
    return finish(state, tx.pmean(grads, "data"), loss=tx.pmean(loss, "data"))


@right({"loss": LOSS})
def sync_gradients(state, batch):
    loss, grads = local(state, batch)
    grads, state = state.sync_gradients(grads)
    return finish(state, grads, loss=tx.pmean(loss, "data"))


@right({"loss": LOSS}, axes=("a", "b"))
def over_both_axes(state, batch):
    loss, grads = local(state, batch)
    return finish(state, tx.pmean(grads, ("a", "b")), loss=tx.pmean(loss, ("b", "a")))


@right({"loss": LOSS}, axes=("a", "b"))
def one_axis_after_the_other(state, batch):
    loss, grads = local(state, batch)
    return finish(state, tx.pmean(tx.pmean(grads, "b"), "a"), loss=tx.pmean(loss, ("a", "b")))


GRADIENTS = {
    "jax_value_and_grad": lambda s, b: tx.pmean(jax.value_and_grad(mse)(s.params, b)[1], "data"),
    "lax_pmean": lambda s, b: lax.pmean(local(s, b)[1], "data"),
    "psum_of_shares": lambda s, b: tx.psum(local(s, b, lambda p, b: errors(p, b).sum() / 8)[1],
                                           "data"),
    "psum_then_divided": lambda s, b: jax.tree.map(
        lambda g: g / tx.axis_size("data"), tx.psum(local(s, b)[1], "data")),
    "divided_then_psum": lambda s, b: tx.psum(
        jax.tree.map(lambda g: g / tx.axis_size("data"), local(s, b)[1]), "data"),
    "cast_outside": lambda s, b: tx.pmean(
        jax.grad(mse)(tx.vary(s.stored_params, "data"), b), "data"),
    "sum_of_a_reduced_loss": lambda s, b: tx.psum(
        jax.grad(lambda p: tx.pmean(mse(p, b), "data"))(s.params), "data"),
    "sum_of_a_loss_gathered_invariant": lambda s, b: tx.psum(jax.grad(
        lambda p: tx.all_gather(errors(p, b), "data", invariant=True).mean())(s.params), "data"),
    "mean_of_a_gathered_loss": lambda s, b: tx.pmean(
        local(s, b, lambda p, b: tx.all_gather(errors(p, b), "data").mean())[1], "data"),
    "mean_of_a_reduced_loss_that_varies": lambda s, b: tx.pmean(local(
        s, b, lambda p, b: tx.vary(tx.pmean(mse(p, b), "data"), "data"))[1], "data"),
    "remat": lambda s, b: tx.pmean(local(s, b, jax.checkpoint(mse))[1], "data"),
    "remat_of_a_gathered_loss": lambda s, b: tx.pmean(local(s, b, jax.checkpoint(
        lambda p, b: tx.all_gather(errors(p, b), "data").mean()))[1], "data"),
    "under_jit": lambda s, b: tx.pmean(local(s, b, jax.jit(mse))[1], "data"),
    "by_linearize": lambda s, b: tx.pmean(
        jax.vjp(lambda p: mse(p, b), s.params)[1](tx.vary(jnp.float32(1), "data"))[0], "data"),
    "reduce_scatter_and_gather": lambda s, b: (lambda g: {
        "b": tx.pmean(g["b"], "data"),
        "w": tx.all_gather(tx.reduce_scatter(jnp.pad(g["w"], (0, 1)), "data", mean=True), "data",
                           invariant=True)[:3]})(local(s, b)[1]),
    "gathered_and_averaged": lambda s, b: jax.tree.map(
        lambda g: tx.all_gather(g[None], "data", invariant=True).mean(0), local(s, b)[1]),
    "gathered_varying_and_averaged": lambda s, b: jax.tree.map(
        lambda g: tx.all_gather(g[None], "data").mean(0), local(s, b)[1]),
    "scan_of_microbatches": lambda s, b: tx.pmean(jax.tree.map(lambda g: g / 2, lax.scan(
        lambda c, part: (jax.tree.map(jnp.add, c, local(s, part)[1]), None),
        tx.vary(jax.tree.map(jnp.zeros_like, s.stored_params), "data"),
        jax.tree.map(lambda a: a.reshape(2, -1, *a.shape[1:]), b))[0]), "data"),
    "reduced_in_each_microbatch": lambda s, b: jax.tree.map(lambda g: g / 2, lax.scan(
        lambda c, part: (jax.tree.map(jnp.add, c, tx.pmean(local(s, part)[1], "data")), None),
        jax.tree.map(jnp.zeros_like, s.stored_params),
        jax.tree.map(lambda a: a.reshape(2, -1, *a.shape[1:]), b))[0]),
    "fori_loop_over_microbatches": lambda s, b: tx.pmean(jax.tree.map(
        lambda g: g / 2, lax.fori_loop(0, 2, lambda i, c: jax.tree.map(jnp.add, c, local(
            s, jax.tree.map(lambda a: a.reshape(2, -1, *a.shape[1:])[i], b))[1]),
            tx.vary(jax.tree.map(jnp.zeros_like, s.stored_params), "data"))), "data"),
    "vmap_of_examples": lambda s, b: tx.pmean(jax.tree.map(lambda g: g.mean(0), jax.vmap(
        jax.grad(lambda p, x, y: (x @ p["w"] + p["b"] - y) ** 2), (None, 0, 0))(
            s.params, b["x"], b["y"])), "data"),
    "cond_on_the_step": lambda s, b: tx.pmean(lax.cond(
        s.step == 0, lambda g: g, lambda g: jax.tree.map(lambda a: 2 * a, g), local(s, b)[1]),
        "data"),
    "cond_on_a_mean": lambda s, b: (lambda g: lax.cond(
        tx.pmean(jnp.mean(b["y"]), "data") < 1e9, lambda g: g,
        lambda g: jax.tree.map(jnp.zeros_like, g), g))(tx.pmean(local(s, b)[1], "data")),
    "divided_by_a_sum_of_ones": lambda s, b: jax.tree.map(
        lambda g: g / lax.psum(jnp.float32(b["y"].shape[0]), "data"),
        tx.psum(local(s, b, lambda p, b: errors(p, b).sum())[1], "data")),
}  # fmt: skip
for _name, _f in GRADIENTS.items():
    _step = gradient_of(_f)
    _step.__name__ = _name
    right()(_step)

_NORM = float((f64(PARAMS["w"]) ** 2).sum())
_LARGEST = float(np.abs(GRAD["w"]).argmax())
METRICS = {
    "norm_of_stored_params": (lambda s, b, g: jnp.sum(s.stored_params["w"] ** 2), _NORM),
    "norm_of_params": (lambda s, b, g: jnp.sum(s.params["w"] ** 2), _NORM),
    "pmean_of_the_norm_of_params": (
        lambda s, b, g: tx.pmean(jnp.sum(s.params["w"] ** 2), "data"), _NORM),
    "argmax_of_reduced": (lambda s, b, g: jnp.argmax(jnp.abs(g["w"])).astype(float), _LARGEST),
    "argsort_of_reduced": (
        lambda s, b, g: jnp.argsort(-jnp.abs(g["w"]))[0].astype(float), _LARGEST),
    "callback_of_reduced": (
        lambda s, b, g: jax.pure_callback(lambda a: np.float32(2 * a), SCALAR,
                                          tx.pmean(b["y"].mean(), "data")), 2 * Y.mean()),
    "mean_of_a_callback": (
        lambda s, b, g: tx.pmean(jax.pure_callback(
            lambda a: np.float32(np.mean(a)), SCALAR, b["y"]), "data"), Y.mean()),
    "sum_of_a_callback": (
        lambda s, b, g: lax.psum(jax.pure_callback(
            lambda a: np.float32(np.sum(a)), SCALAR, b["y"]), "data"), Y.sum()),
    "sum_of_lax_reduce": (
        lambda s, b, g: tx.psum(lax.reduce(jnp.zeros(3), b["y"].sum(), lax.add, (0,)), "data"),
        Y.sum()),
    "sum_of_a_count_in_lax_sort": (
        lambda s, b, g: tx.psum(lax.sort((b["y"], jnp.ones(b["y"].shape[0])), num_keys=1)[1].sum(),
                                "data"), 8.0),
    "max": (lambda s, b, g: tx.pmax(b["y"].max(), "data"), Y.max()),
    "min": (lambda s, b, g: lax.pmin(b["y"].min(), "data"), Y.min()),
    "max_of_callback": (
        lambda s, b, g: tx.pmax(tx.vary(jax.pure_callback(
            lambda a: np.float32(np.max(a)), SCALAR, b["y"]), "data"), "data"), Y.max()),
    "count_of_examples": (
        lambda s, b, g: lax.psum(jnp.float32(b["y"].shape[0]), "data"), 8.0),
    "count_that_was_cast": (
        lambda s, b, g: tx.psum(tx.vary(jnp.float32(b["y"].shape[0]), "data"), "data"), 8.0),
    "count_of_the_mask": (lambda s, b, g: tx.psum(b["m"].sum(), "data"), MASK.sum()),
    "share_of_the_mask": (
        lambda s, b, g: tx.psum(b["m"].sum(), "data") / tx.psum(b["m"].size * tx.vary(
            jnp.float32(1), "data"), "data"), MASK.mean()),
    "gathered": (lambda s, b, g: tx.all_gather(b["y"], "data").max(), Y.max()),
    "gathered_median": (
        lambda s, b, g: jnp.median(tx.all_gather(b["y"], "data", invariant=True)), np.median(Y)),
    "mean_of_gathered": (lambda s, b, g: tx.pmean(tx.all_gather(b["y"], "data").max(), "data"),
                         Y.max()),
    "first_example": (
        lambda s, b, g: tx.broadcast(b["y"][0], "data"), Y[0]),
    "masked": (
        lambda s, b, g: tx.pmean(tx.example_mean(errors(s.params, b), b["m"], axis="data"),
                                 "data"), weighted(MASK)[0]),
    "masked_by_bools": (
        lambda s, b, g: tx.pmean(tx.example_mean(errors(s.params, b), b["m"] != 0, axis="data"),
                                 "data"), weighted(MASK)[0]),
    "weighted": (
        lambda s, b, g: tx.pmean(tx.example_mean(
            errors(s.params, b), axis="data", weights=b["w"]), "data"), weighted(WEIGHTS)[0]),
    "weights_as_a_mask": (
        lambda s, b, g: tx.pmean(tx.example_mean(errors(s.params, b), b["w"], axis="data"),
                                 "data"), weighted(WEIGHTS)[0]),
    "masked_and_weighted": (
        lambda s, b, g: tx.pmean(tx.example_mean(
            errors(s.params, b), b["m"], axis="data", weights=b["w"]), "data"),
        weighted(MASK * WEIGHTS)[0]),
    "small_weights": (
        lambda s, b, g: tx.pmean(tx.example_mean(
            errors(s.params, b), axis="data", weights=b["w"] / 1000), "data"),
        weighted(WEIGHTS)[0]),
    "tokens": (
        lambda s, b, g: tx.pmean(tx.example_mean(
            b["t"].reshape(-1), b["tm"].reshape(-1), axis="data"), "data"),
        (f64(TOKENS) * TOKEN_MASK).sum() / TOKEN_MASK.sum()),
    "tokens_in_a_loop_of_their_own": (
        lambda s, b, g: tx.pmean(lax.scan(lambda c, _: (c + tx.example_mean(
            b["t"].reshape(-1), b["tm"].reshape(-1), axis="data"), None),
            tx.vary(jnp.float32(0), "data"), None, length=2)[0] / 2, "data"),
        (f64(TOKENS) * TOKEN_MASK).sum() / TOKEN_MASK.sum()),
    "all_gathered_examples_in_vmap": (
        lambda s, b, g: jax.vmap(lambda y: y * 2)(tx.all_gather(b["y"], "data")).sum(),
        2 * Y.sum()),
    "while_by_a_sum": (
        lambda s, b, g: lax.while_loop(lambda c: c < tx.psum(b["m"].sum(), "data"),
                                       lambda c: c + 1.0, jnp.float32(0)), 4.0),
}  # fmt: skip
for _name, (_metric, _truth) in METRICS.items():
    _step = measure(_metric)
    _step.__name__ = _name
    right({"m": float(_truth)})(_step)


def _parts(state, batch, values, mask):
    """The masked mean over two parts of the batch, with the count of the whole."""
    count = tx.psum(mask.sum(), "data")
    parts = jax.tree.map(lambda a: a.reshape(2, -1, *a.shape[1:]), batch)

    def body(total, part):
        def loss(params):
            return tx.example_mean(*values(params, part), axis="data", count=count)

        return jax.tree.map(jnp.add, total, tx.value_and_grad(loss)(state.params)), None

    zeros = tx.vary((jnp.float32(0), jax.tree.map(jnp.zeros_like, state.stored_params)), "data")
    (loss, grads), _ = lax.scan(body, zeros, parts)
    return finish(state, tx.pmean(grads, "data"), loss=tx.pmean(loss, "data"))


@right({"loss": weighted(MASK)[0]}, updated(weighted(MASK)[1]))
def masked_microbatches(state, batch):
    return _parts(state, batch, lambda p, b: (errors(p, b), b["m"]), batch["m"])


_DECAY = {"w": GRAD["w"] + 0.01 * f64(PARAMS["w"]), "b": GRAD["b"] + 0.01 * 0.1}


@right(params=updated(_DECAY))
def decay_of_params(state, batch):
    """Made of state.params, which is typed as varying: equal all the same."""
    grads = tx.pmean(local(state, batch)[1], "data")
    return finish(state, jax.tree.map(lambda g, p: g + 0.01 * p, grads, state.params))


@right(params=updated(_DECAY))
def decay_of_stored_params(state, batch):
    grads = tx.pmean(local(state, batch)[1], "data")
    return finish(state, jax.tree.map(lambda g, p: g + 0.01 * p, grads, state.stored_params))


@right(params=updated(_DECAY))
def decay_in_the_loss(state, batch):
    def loss(params, batch):
        return mse(params, batch) + 0.005 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))

    return finish(state, tx.pmean(local(state, batch, loss)[1], "data"))


@right(params=updated(w=np.zeros(3)))
def an_unused_parameter(state, batch):
    """Its gradient is zero, whatever sums it."""

    def loss(params, batch):
        return errors({**params, "w": lax.stop_gradient(params["w"])}, batch).sum() / 8

    return finish(state, tx.psum(local(state, batch, loss)[1], "data"))


_KEEP = np.zeros(3)
_KEEP[np.abs(GRAD["w"]).argsort()[-2:]] = 1


@right(params=updated(w=GRAD["w"] * _KEEP))
def top_two_of_reduced(state, batch):
    grads = tx.pmean(local(state, batch)[1], "data")
    keep = jnp.argsort(-jnp.abs(grads["w"]))[:2]
    return finish(state, {**grads, "w": grads["w"] * jnp.zeros(3).at[keep].set(1.0)})


_FACTOR = min(1.0, 0.5 / np.sqrt((GRAD["w"] ** 2).sum() + GRAD["b"] ** 2))


@right(params=updated({k: g * _FACTOR for k, g in GRAD.items()}))
def clipped_after_the_mean(state, batch):
    grads = tx.pmean(local(state, batch)[1], "data")
    return finish(state, tx.optim.clip_by_global_norm(grads, 0.5))


def _private():
    """The mean of each example's gradient, clipped to a norm of 1."""
    each = 2 * (f64(X) @ PARAMS["w"] + PARAMS["b"] - Y)
    each = np.concatenate([each[:, None] * X, each[:, None]], 1)
    each *= np.minimum(1, 1 / np.linalg.norm(each, axis=1))[:, None]
    return {"w": each.mean(0)[:3], "b": each.mean(0)[3]}


def _each(state, x, y):
    return jax.grad(lambda p: (x @ p["w"] + p["b"] - y) ** 2)(state.params)


@right(params=updated(_private()))
def each_example_clipped_in_vmap(state, batch):
    clipped = jax.vmap(lambda x, y: tx.optim.clip_by_global_norm(_each(state, x, y), 1.0))
    grads = jax.tree.map(lambda g: g.mean(0), clipped(batch["x"], batch["y"]))
    return finish(state, tx.pmean(grads, "data"))


@right(params=updated(_private()))
def each_example_clipped_in_a_loop(state, batch):
    def clipped(row):
        return tx.optim.clip_by_global_norm(_each(state, *row), 1.0, parts=True)

    grads = jax.tree.map(lambda g: g.mean(0), lax.map(clipped, (batch["x"], batch["y"])))
    return finish(state, tx.pmean(grads, "data"))


@right(extra={"a": 0.9 * 2 + 0.1 * f64(Y).mean()})
def running_mean(state, batch):
    grads = tx.pmean(local(state, batch)[1], "data")
    mean = tx.pmean(jnp.mean(batch["y"]), "data")
    extra = {**state.extra, "a": 0.9 * state.extra["a"] + 0.1 * mean}
    return finish(state.replace(extra=extra), grads)


@right(extra={"v": f64(PARAMS["w"])})
def extra_of_params(state, batch):
    grads = tx.pmean(local(state, batch)[1], "data")
    return finish(state.replace(extra={**state.extra, "v": state.params["w"]}), grads)


def _centred():
    """The gradient of mean((x @ w - mean(x @ w)) ** 2), and the mean."""
    hidden = f64(X) @ PARAMS["w"]
    residual = hidden - hidden.mean()
    return {"w": 2 * (residual[:, None] * (X - f64(X).mean(0))).mean(0), "b": 0.0}, (hidden.mean())


def statistics(wrap):
    def step(state, batch):
        def loss(params):
            hidden = batch["x"] @ params["w"]
            mean = tx.vary(tx.pmean(hidden.mean(), "data"), "data", name="bn")
            return jnp.mean((hidden - mean) ** 2), mean

        both = tx.value_and_grad(wrap(loss), has_aux=True)
        (_, mean), grads = both(state.params)
        state = state.replace(extra={**state.extra, "a": mean})
        return finish(state, tx.pmean(grads, "data"))

    return step


for _name, _wrap in (("batch_statistics", lambda f: f), ("rematted_statistics", jax.checkpoint)):
    _step = statistics(_wrap)
    _step.__name__ = _name
    right(params=updated(_centred()[0]), extra={"a": _centred()[1]})(_step)


@jax.custom_vjp
def doubled(x):
    return 2.0 * x


doubled.defvjp(lambda x: (2.0 * x, None), lambda _, g: (g * jnp.float32(2) + jnp.zeros(()),))


@right(params=updated({k: 2 * g for k, g in GRAD.items()}))
def custom_vjp(state, batch):
    grads = local(state, batch, lambda p, b: doubled(mse(p, b)))[1]
    return finish(state, tx.pmean(grads, "data"))


@right(params=updated())
def two_inner_steps(state, batch):
    """A loop over whole steps: all that is carried is reduced in each."""

    def inner(params, _):
        grads = tx.grad(mse)(tx.vary(params, "data"), batch)
        return jax.tree.map(lambda p, g: p - 0 * g, params, tx.pmean(grads, "data")), None

    params, _ = lax.scan(inner, state.stored_params, None, length=2)
    grads = tx.pmean(tx.grad(mse)(tx.vary(params, "data"), batch), "data")
    return finish(state, grads)
