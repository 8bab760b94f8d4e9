"""Steps that give another number on several devices than on one: each must be refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from guard_data import PARAMS, errors, mse
from jax import lax
from right_steps import SCALAR, _each, finish, gradient_of, local, measure

import txcore as tx

WRONG: dict[str, Any] = {}  # name: (step, a part of the error, axes)
DIFFERS = "varies along axis"


def wrong(text=DIFFERS, axes=("data",)):
    def add(step):
        WRONG[step.__name__] = (step, text, axes)
        return step

    return add


def table(steps, make, text):
    for name, f in steps.items():
        step = make(f)
        step.__name__ = name
        wrong(text)(step)


def with_extra(f):
    """A step that stores f(state, batch, grads) in extra."""

    def step(state, batch):
        grads = tx.pmean(local(state, batch)[1], "data")
        extra = {**state.extra, "a": f(state, batch, grads)}
        return finish(state.replace(extra=extra), grads)

    return step


def scaled(f):
    """A step whose reduced gradients are multiplied by f(state, batch, local gradients)."""

    def step(state, batch):
        grads = local(state, batch)[1]
        factor = f(state, batch, grads)
        return finish(state, jax.tree.map(lambda g: g * factor, tx.pmean(grads, "data")))

    return step


def key_of(b):
    return jax.random.key((b["y"][-1] * 100).astype(jnp.int32))


def bits(b):
    seed = jnp.stack([b["y"][-1]] * 4).view(jnp.uint32)
    return lax.rng_bit_generator(seed, (1,))[1][0].astype(float)


def host(f, x):
    return jax.pure_callback(lambda a: np.float32(f(a)), SCALAR, x)


def host_io(f, x):
    return jax.experimental.io_callback(lambda a: np.float32(f(a)), SCALAR, x)


LOCAL = {
    "argsort": lambda s, b, g: jnp.argsort(b["y"])[0].astype(float),
    "sort_key_val": lambda s, b, g: lax.sort_key_val(b["y"], jnp.arange(b["y"].size))[1][0] * 1.0,
    "sort": lambda s, b, g: jnp.sort(b["y"])[0],
    "sort_of_two": lambda s, b, g: lax.sort(
        (b["y"], jnp.linspace(0, 1, b["y"].size)), num_keys=1)[1][-1],
    "top_k": lambda s, b, g: lax.top_k(b["y"], 1)[1][0].astype(float),
    "argmax": lambda s, b, g: jnp.argmax(b["y"]).astype(float),
    "pure_callback": lambda s, b, g: host(np.mean, b["y"]),
    "io_callback": lambda s, b, g: host_io(np.mean, b["y"]),
    "callback_in_vmap": lambda s, b, g: jax.vmap(lambda y: jax.pure_callback(
        np.sin, SCALAR, y, vmap_method="expand_dims"))(b["y"]).sum(),
    "reduce_from_local": lambda s, b, g: lax.reduce(jnp.ones(3), b["y"][-1], lax.add, (0,)),
    "reduce_window_from_local": lambda s, b, g: lax.reduce_window(
        jnp.ones(3), b["y"][-1], lax.add, (3,), (1,), "VALID")[0],
    "permutation": lambda s, b, g: jax.random.permutation(key_of(b), 9)[0].astype(float),
    "choice": lambda s, b, g: jax.random.choice(key_of(b), jnp.arange(99.0)),
    "bits": lambda s, b, g: bits(b),
    "uniform": lambda s, b, g: jax.random.uniform(key_of(b)),
    "searchsorted": lambda s, b, g: jnp.searchsorted(
        jnp.linspace(-5, 5, 99), b["y"][-1]).astype(float),
    "cumsum": lambda s, b, g: jnp.cumsum(b["y"])[-1],
    "histogram": lambda s, b, g: jnp.histogram(b["y"], 3, (-5.0, 5.0))[0][0].astype(float),
    "median": lambda s, b, g: jnp.median(b["y"]),
    "unique": lambda s, b, g: jnp.unique(b["m"] * b["y"], size=3)[0],
    "associative_scan": lambda s, b, g: lax.associative_scan(jnp.maximum, b["y"])[-1],
    "scatter": lambda s, b, g: jnp.zeros(9).at[jnp.argsort(b["y"])[0]].set(1.0)[1],
    "scan_carry": lambda s, b, g: lax.scan(
        lambda c, y: (c + y, None), tx.vary(jnp.float32(0), "data"), b["y"])[0],
    "while_until_local": lambda s, b, g: lax.while_loop(
        lambda c: c[0] < b["y"][-1], lambda c: (c[0] + 0.5, c[1] + 1.0),
        (tx.vary(jnp.float32(-5), "data"), tx.vary(jnp.float32(0), "data")))[1],
    "cond_of_local": lambda s, b, g: lax.cond(
        b["y"][-1] > 0, lambda z: z + 1.0, lambda z: z, tx.vary(jnp.float32(0), "data")),
    "select_of_local": lambda s, b, g: jnp.where(b["y"][-1] > 0, 1.0, 0.0),
    "argsort_in_jit": lambda s, b, g: jax.jit(jnp.argsort)(b["y"])[0].astype(float),
    "argsort_in_remat": lambda s, b, g: jax.checkpoint(jnp.argsort)(b["y"])[0].astype(float),
    "argsort_in_vmap": lambda s, b, g: jax.vmap(jnp.argsort)(b["x"])[:, 0].sum() * 1.0,
    "argsort_of_gradients": lambda s, b, g: jnp.argsort(g["w"])[0] * 1.0
    if s is None else jnp.argsort(local(s, b)[1]["w"])[0] * 1.0,
    "shifted": lambda s, b, g: tx.shift(b["y"].sum(), "data"),
    "reduce_scattered": lambda s, b, g: tx.reduce_scatter(
        jnp.resize(b["y"], 4), "data")[0],
    "broadcast_of_mistyped": lambda s, b, g: tx.broadcast(
        jnp.argsort(b["y"])[0].astype(float), "data"),
}  # fmt: skip
table({f"metric_of_{k}": f for k, f in LOCAL.items()}, measure, r"metrics\['m'\] varies along")
_STORED = ("argsort", "pure_callback", "io_callback", "reduce_from_local", "permutation", "bits",
           "cumsum", "scatter", "argsort_in_jit", "cond_of_local")  # fmt: skip
table({f"extra_of_{k}": LOCAL[k] for k in _STORED}, with_extra, r"state\.extra\['a'\] varies along")
table(
    {f"gradients_times_{k}": LOCAL[k] for k in _STORED},
    scaled,
    r"the gradient of params\['b'\] varies along axis 'data'",
)

TWICE = "which multiplies it by|multiply it by"
SUMS = {
    "psum_of_pmean": lambda s, b, g: tx.psum(tx.pmean(mse(s.params, b), "data"), "data"),
    "lax_psum_of_pmean": lambda s, b, g: lax.psum(lax.pmean(mse(s.params, b), "data"), "data"),
    "lax_psum_of_a_tree": lambda s, b, g: lax.psum(
        {"a": mse(s.params, b) * 0, "b": tx.pmean(mse(s.params, b), "data")}, "data")["b"],
    "psum_of_a_norm": lambda s, b, g: tx.psum(jnp.sum(s.params["w"] ** 2), "data"),
    "psum_of_a_norm_cast_by_hand": lambda s, b, g: tx.psum(
        jnp.sum(tx.vary(s.stored_params["w"], "data") ** 2), "data"),
    "psum_of_params": lambda s, b, g: tx.psum(s.params["b"], "data"),
    "lax_psum_of_stored_params": lambda s, b, g: lax.psum(s.stored_params["b"], "data"),
    "psum_of_extra": lambda s, b, g: tx.psum(s.extra["a"], "data"),
    "psum_of_gathered": lambda s, b, g: tx.psum(tx.all_gather(b["y"], "data").sum(), "data"),
    "psum_of_gathered_invariant": lambda s, b, g: lax.psum(
        tx.all_gather(b["y"], "data", invariant=True).sum(), "data"),
    "psum_of_max": lambda s, b, g: lax.psum(tx.pmax(b["y"].max(), "data"), "data"),
    "psum_in_a_scan": lambda s, b, g: lax.scan(
        lambda c, _: (c + lax.psum(s.extra["a"], "data"), None), jnp.float32(0), None, length=2)[0],
    "psum_in_a_cond": lambda s, b, g: lax.cond(
        s.step == 0, lambda a: lax.psum(a, "data"), lambda a: a, s.extra["a"]),
    "psum_in_jit": lambda s, b, g: jax.jit(lambda a: lax.psum(a, "data"))(s.extra["a"]),
    "psum_in_remat": lambda s, b, g: jax.checkpoint(lambda a: lax.psum(a, "data"))(s.extra["a"]),
    "psum_in_vmap": lambda s, b, g: jax.vmap(lambda a: lax.psum(a, "data"))(s.extra["v"]).sum(),
    "psum_of_a_callback_of_reduced": lambda s, b, g: lax.psum(
        host(np.sum, tx.psum(b["y"].sum(), "data")), "data"),
    "scattered_sum_of_equal": lambda s, b, g: tx.pmax(lax.psum_scatter(
        jnp.full(4, 1.0) * s.params["b"], "data", tiled=True).max(), "data"),
}  # fmt: skip
table(SUMS, measure, TWICE)


def again(x):
    """One more sum, cast as a carry's type needs it."""
    return tx.vary(tx.psum(x, "data"), "data")


def in_each_trip(body, start):
    return lax.scan(lambda c, _: (body(c), None), start, None, length=2)[0]


@jax.custom_vjp
def summed(x):
    return again(x)


summed.defvjp(lambda x: (again(x), None), lambda _, g: (g,))

TERM = f"multiplies that term by|{TWICE}"
# Sums through a carry or a call, of what one has summed before: gradients without a mean.
CARRIED = {
    "psum_in_each_trip": lambda g, s, b: in_each_trip(again, g),
    "psum_in_each_trip_scaled": lambda g, s, b: in_each_trip(lambda c: again(c * 0.5), g),
    "psum_in_each_trip_of_a_tree": lambda g, s, b: in_each_trip(
        lambda c: (again(c[0]), c[1] + 1), (g, tx.vary(jnp.float32(0), "data")))[0],
    "psum_of_a_growing_total": lambda g, s, b: lax.scan(
        lambda c, part: (again(c + local(s, part)[1]["w"]), None), jnp.zeros_like(g), halves(b))[0],
    "lax_psum_in_each_trip": lambda g, s, b: in_each_trip(
        lambda c: tx.vary(lax.psum(c, "data"), "data"), g),
    "psum_in_a_while": lambda g, s, b: lax.while_loop(
        lambda c: c[0] < 2, lambda c: (c[0] + 1, again(c[1])), (0, g))[1],
    "psum_in_a_fori_loop": lambda g, s, b: lax.fori_loop(0, 2, lambda i, c: again(c), g),
    "psum_under_remat_in_each_trip": lambda g, s, b: in_each_trip(jax.checkpoint(again), g),
    "psum_under_jit_in_each_trip": lambda g, s, b: in_each_trip(jax.jit(again), g),
    "psum_of_a_custom_vjp_in_each_trip": lambda g, s, b: in_each_trip(summed, g),
    "psum_in_a_branch_in_each_trip": lambda g, s, b: in_each_trip(
        lambda c: lax.cond(s.step == 0, again, lambda v: again(2 * v), c), g),
    "psum_of_both_branches": lambda g, s, b: tx.psum(
        lax.cond(s.step == 0, again, lambda v: again(2 * v), g), "data"),
    "psum_of_a_jitted_sum": lambda g, s, b: tx.psum(jax.jit(again)(g), "data"),
    "psum_of_a_rematted_sum": lambda g, s, b: tx.psum(jax.checkpoint(again)(g), "data"),
    "psum_of_a_custom_vjp": lambda g, s, b: tx.psum(summed(g), "data"),
    "psum_with_a_term_of_a_sum": lambda g, s, b: tx.psum(g + again(g), "data"),
}  # fmt: skip


def of_carried(f):
    def step(state, batch):
        grads = local(state, batch)[1]
        w = tx.pmax(f(grads["w"], state, batch), "data")
        return finish(state, {"b": tx.pmean(grads["b"], "data"), "w": w})

    return step


table(CARRIED, of_carried, TERM)

_SUMMED = "gradients of a loss that is the same on every device"
GRADIENTS = {
    "not_reduced": (lambda s, b: local(s, b)[1], DIFFERS),
    "reduced_twice": (
        lambda s, b: lax.psum(tx.pmean(local(s, b)[1], "data"), "data"), TWICE),
    "psum_of_pmean_gradients": (
        lambda s, b: tx.psum(tx.pmean(local(s, b)[1], "data"), "data"), TWICE),
    "one_leaf_not_reduced": (
        lambda s, b: (lambda g: {**g, "w": tx.pmean(g["w"], "data")})(local(s, b)[1]),
        r"params\['b'\] varies"),
    "mean_of_a_reduced_loss": (
        lambda s, b: tx.pmean(jax.grad(lambda p: tx.pmean(mse(p, b), "data"))(s.params), "data"),
        "averages gradients of a loss that is reduced already"),
    "mean_of_a_lax_reduced_loss": (
        lambda s, b: s.sync_gradients(jax.value_and_grad(
            lambda p: lax.pmean(mse(p, b), "data"))(s.params)[1])[0],
        "averages gradients of a loss that is reduced already"),
    "mean_of_a_rematted_reduced_loss": (
        lambda s, b: tx.pmean(jax.grad(jax.checkpoint(
            lambda p: lax.pmean(mse(p, b), "data")))(s.params), "data"),
        "averages gradients of a loss that is reduced already"),
    "mean_of_an_invariant_gather": (
        lambda s, b: tx.pmean(jax.grad(lambda p: tx.all_gather(
            errors(p, b), "data", invariant=True).mean())(s.params), "data"),
        "averages gradients of a loss that is reduced already"),
    "reduced_loss": (
        lambda s, b: tx.pmean(local(s, b, lambda p, b: tx.pmean(mse(p, b), "data"))[1], "data"),
        "needs a loss that is local|of a loss that is reduced already"),
    "psum_of_a_gathered_loss": (
        lambda s, b: tx.psum(local(s, b, lambda p, b: tx.all_gather(
            errors(p, b), "data").mean())[1], "data"), _SUMMED),
    "psum_of_a_gathered_loss_in_jit": (
        lambda s, b: tx.psum(local(s, b, jax.jit(lambda p, b: tx.all_gather(
            errors(p, b), "data").mean()))[1], "data"), _SUMMED),
    "lax_psum_of_a_rematted_gathered_loss": (
        lambda s, b: lax.psum(local(s, b, jax.checkpoint(lambda p, b: tx.all_gather(
            errors(p, b), "data").mean()))[1], "data"), _SUMMED),
    "psum_of_a_loss_reduced_and_cast": (
        lambda s, b: tx.psum(local(s, b, lambda p, b: tx.vary(
            tx.pmean(mse(p, b), "data"), "data"))[1], "data"), _SUMMED),
    "stored_params": (
        lambda s, b: jax.grad(mse)(s.stored_params, b), "autodiff put a psum"),
    "cast_inside_grad": (
        lambda s, b: jax.grad(lambda p: mse(tx.vary(p, "data"), b))(s.stored_params),
        "autodiff put a psum|gradients that autodiff summed"),
    "cast_inside_value_and_grad": (
        lambda s, b: jax.value_and_grad(lambda p: mse(tx.vary(p, "data"), b))(
            s.stored_params)[1], "autodiff put a psum|gradients that autodiff summed"),
    "cast_inside_a_scan": (
        lambda s, b: lax.scan(lambda c, _: (jax.grad(lambda p: mse(tx.vary(p, "data"), b))(
            s.stored_params), None), s.stored_params, None, length=2)[0],
        "autodiff put a psum|gradients that autodiff summed"),
    "clipped_before": (
        lambda s, b: tx.pmean(tx.optim.clip_by_global_norm(local(s, b)[1], 0.5), "data"),
        "clip_by_global_norm needs gradients that are whole"),
    "mean_times_a_mistyped_value": (
        lambda s, b: tx.pmean(local(s, b, lambda p, b: mse(p, b) + host(np.mean, b["y"])
                                    * tx.pmean(mse(p, b), "data"))[1], "data"),
        "autodiff has summed over the devices on their way back.* of pure_callback|"
        "jax types what pure_callback"),
    "sum_of_decay": (
        lambda s, b: {**tx.pmean(local(s, b)[1], "data"),
                      "b": tx.psum(jax.grad(lambda p: p["b"] ** 2)(s.params)["b"], "data")},
        TWICE),
    "scan_with_a_doubled_sum": (
        lambda s, b: lax.psum(lax.scan(lambda c, part: (jax.tree.map(jnp.add, c, tx.pmean(
            local(s, part)[1], "data")), None), jax.tree.map(jnp.zeros_like, s.stored_params),
            jax.tree.map(lambda a: a.reshape(2, -1, *a.shape[1:]), b))[0], "data"), TWICE),
    "cond_with_a_doubled_sum": (
        lambda s, b: lax.cond(s.step == 0, lambda g: lax.psum(g, "data"), lambda g: g,
                              tx.pmean(local(s, b)[1], "data")), TWICE),
}  # fmt: skip
for _name, (_f, _text) in GRADIENTS.items():
    table({_name: _f}, gradient_of, _text)


@jax.custom_vjp
def gathered(x):
    return tx.all_gather(x, "data").mean()


gathered.defvjp(lambda x: (gathered(x), x), lambda x, g: (x * 0 + g / 8,))


@wrong(TWICE)
def custom_vjp_of_a_gather(state, batch):
    grads = tx.pmean(local(state, batch)[1], "data")
    return finish(state, grads, m=tx.psum(gathered(errors(state.params, batch)), "data"))


@wrong(r"metrics\['m'\] varies along axis 'b'", ("a", "b"))
def metric_over_one_axis(state, batch):
    grads = tx.pmean(local(state, batch)[1], ("a", "b"))
    return finish(state, grads, m=tx.pmean(mse(state.params, batch), "a"))


@wrong(r"params\['b'\] varies along axis 'b'", ("a", "b"))
def gradients_over_one_axis(state, batch):
    return finish(state, tx.pmean(local(state, batch)[1], "a"))


@wrong(TWICE, ("a", "b"))
def summed_over_one_axis_more(state, batch):
    grads = tx.pmean(local(state, batch)[1], ("a", "b"))
    once = tx.psum(errors(state.params, batch).sum(), "b")
    return finish(state, grads, m=tx.psum(once, ("a", "b")))


@wrong("needs all axes that the batch is sharded over", ("a", "b"))
def mask_over_one_axis(state, batch):
    grads = tx.pmean(local(state, batch)[1], ("a", "b"))
    mean = tx.example_mean(errors(state.params, batch), batch["m"], axis="a")
    return finish(state, grads, m=tx.pmean(mean, ("a", "b")))


def halves(batch):
    return jax.tree.map(lambda a: a.reshape(2, -1, *a.shape[1:]), batch)


def mean_of_means(values, mask):
    def step(state, batch):
        grads = tx.pmean(local(state, batch)[1], "data")
        total, _ = lax.scan(
            lambda c, part: (c + tx.example_mean(values(state, part), mask(part), axis="data"), 0),
            tx.vary(jnp.float32(0), "data"),
            halves(batch),
        )
        return finish(state, grads, m=tx.pmean(total / 2, "data"))

    return step


table(
    {"masked_microbatches_averaged": lambda s, b: errors(s.params, b)},
    lambda f: mean_of_means(f, lambda b: b["m"]),
    r"needs the mask of the whole batch, \d examples on this device",
)
table(
    {"tokens_of_microbatches_averaged": lambda s, b: b["t"].reshape(-1)},
    lambda f: mean_of_means(f, lambda b: b["tm"].reshape(-1)),
    "counts what is real in one part of the batch",
)


@wrong("needs the mask of the whole batch")
def masked_halves_averaged(state, batch):
    grads = tx.pmean(local(state, batch)[1], "data")
    mean = jnp.float32(0)
    for i in (0, 1):
        part = jax.tree.map(lambda a, i=i: a[i], halves(batch))
        mean += tx.example_mean(errors(state.params, part), part["m"], axis="data")
    return finish(state, grads, m=tx.pmean(mean / 2, "data"))


@wrong("count= the number of the whole global batch")
def count_of_one_device(state, batch):
    grads = tx.pmean(local(state, batch)[1], "data")
    count, each = jnp.argsort(batch["y"])[0] + 1.0, errors(state.params, batch)
    return finish(state, grads, m=tx.pmean(tx.example_mean(each, axis="data", count=count), "data"))


@wrong("clip_by_global_norm needs gradients that are whole")
def each_example_clipped_with_the_batch(state, batch):
    grads = _each(state, batch["x"][0], batch["y"][0])
    return finish(state, tx.pmean(tx.optim.clip_by_global_norm(grads, 0.1), "data"))


ASKED = {
    "of_a_parameter": (
        measure(lambda s, b, g: tx.psum(tx.vary(s.stored_params["b"], "data"), "data")),
        lambda n: n * float(PARAMS["b"]),
    ),
    "of_a_mean": (
        measure(lambda s, b, g: tx.psum(tx.vary(tx.pmean(b["m"].mean(), "data"), "data"), "data")),
        lambda n: n * 0.5,
    ),
}
