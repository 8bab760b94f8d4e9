"""The audit says where gradients are summed though the plan predicts their mean; nowhere else."""

import os
import pathlib
import sys

import float16_steps
import guard_data
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from guard_data import BATCH, EXTRA, PARAMS, errors, mse
from jax import lax
from right_steps import RIGHT, finish, gradient_of, local

import txcore as tx
from txcore.profiling.declared.gradient_factors import read_gradient_factors

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples" / "mnist"))

import models
import train

pytestmark = pytest.mark.sampled(2)

ALL = os.environ.get("TXCORE_ALL_GUARDS") == "1"


def factors(step, n=4, axes=("data",)):
    """The factor of each parameter's gradient, of a step that may be refused for nothing else."""
    engine = guard_data.engine(n, axes)
    state = engine.create_state(PARAMS, EXTRA)
    steps = engine._steps
    program = steps.compile(tx.step_fn(step), state, steps.place(BATCH), train=True)[1].program
    return read_gradient_factors(program.jaxpr, axes)


def psum(grads):
    return tx.psum(grads, "data")


def halves(batch):
    return jax.tree.map(lambda a: a.reshape(2, -1, *a.shape[1:]), batch)


def half(batch, i):
    return jax.tree.map(lambda a: a[i], halves(batch))


def decay(params):
    return 0.005 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))


def masked(params, batch, **options):
    return tx.example_mean(errors(params, batch), batch["m"], axis="data", **options)


def by_examples(params, batch):
    """The sum of the squares over the number of all real examples: shares of the global mean."""
    return (errors(params, batch) * batch["m"]).sum() / tx.psum(batch["m"].sum(), "data")


def summed_in_a_scan(state, batch, loss=mse, reduce=lambda g: g, **options):
    """The sum over two microbatches."""
    zeros = jax.tree.map(jnp.zeros_like, state.stored_params)

    def add(total, part):
        grads = tx.grad(lambda p: loss(p, part, **options))(state.params)
        return jax.tree.map(jnp.add, total, reduce(grads)), None

    return lax.scan(add, zeros if reduce is psum else tx.vary(zeros, "data"), halves(batch))[0]


def divide(grads, number):
    return jax.tree.map(lambda g: g / number, grads)


def through_a_bucket(grads):
    flat = psum(jnp.concatenate([grads["b"][None], grads["w"], jnp.zeros(4)]))
    return {"b": flat[0], "w": flat[1:4]}


def count_of(batch):
    return tx.psum(batch["m"].sum(), "data")


SUMMED = {
    "psum": lambda s, b: psum(local(s, b)[1]),
    "lax.psum": lambda s, b: lax.psum(local(s, b)[1], "data"),
    "jax.grad": lambda s, b: psum(jax.grad(mse)(s.params, b)),
    "value_and_grad with aux": lambda s, b: psum(
        tx.grad(lambda p: (mse(p, b), p), has_aux=True)(s.params)[0]),
    "example_mean": lambda s, b: psum(local(s, b, masked)[1]),
    "example_mean with weights": lambda s, b: psum(local(s, b, lambda p, b: tx.example_mean(
        errors(p, b), axis="data", weights=b["w"]))[1]),
    "example_mean with a count": lambda s, b: psum(
        local(s, b, lambda p, b: masked(p, b, count=count_of(b)))[1]),
    "example_mean without a mask": lambda s, b: psum(local(
        s, b, lambda p, b: tx.example_mean(errors(p, b), axis="data"))[1]),
    "under remat": lambda s, b: psum(local(s, b, jax.checkpoint(mse))[1]),
    "under jit": lambda s, b: psum(local(s, b, jax.jit(mse))[1]),
    "a sum over the local count": lambda s, b: psum(
        local(s, b, lambda p, b: errors(p, b).sum() / b["y"].size)[1]),
    "with decay in the loss": lambda s, b: psum(
        local(s, b, lambda p, b: mse(p, b) + decay(p))[1]),
    "a mean of tokens": lambda s, b: psum(local(
        s, b, lambda p, b: jnp.mean((b["t"] * p["b"] - p["w"].sum()) ** 2))[1]),
    "a mean of means": lambda s, b: psum(local(
        s, b, lambda p, b: ((b["x"] * p["w"] + p["b"]) ** 2).mean(1).mean())[1]),
    "in a bucket": lambda s, b: through_a_bucket(local(s, b)[1]),
    "two microbatches by hand": lambda s, b: psum(divide(jax.tree.map(
        jnp.add, *(local(s, half(b, i))[1] for i in (0, 1))), 2)),
    "a scan of microbatches": lambda s, b: psum(divide(summed_in_a_scan(s, b), 2)),
    "a scan, divided after the sum": lambda s, b: divide(psum(summed_in_a_scan(s, b)), 2),
    "a scan that reduces each": lambda s, b: divide(summed_in_a_scan(s, b, reduce=psum), 2),
    "a scan with a count": lambda s, b: psum(
        summed_in_a_scan(s, b, masked, count=count_of(b))),
    "a loss that is summed over the devices": lambda s, b: psum(
        jax.grad(lambda p: lax.psum(mse(p, b), "data"))(s.params)),
}  # fmt: skip


@pytest.mark.parametrize("n", (2, 4) if ALL else (4,))
@pytest.mark.parametrize("name", SUMMED)
def test_a_sum_of_gradients_of_means(name, n):
    read = factors(gradient_of(SUMMED[name]), n)
    # On two devices a sum that is divided by two is a mean of what they have, whatever is meant.
    said = ("mean", 1) if (name, n) == ("a scan, divided after the sum", 2) else ("sum", n)
    assert {(f.what, f.factor, f.times) for f in read} == {
        ("params['b']", *said),
        ("params['w']", *said),
    }
    assert all(f.source.startswith("test_gradient_factors.py:") for f in read)


def over_one_of_two(state, batch):
    grads = tx.psum(local(state, batch)[1], ("a", "b"))
    return finish(state, grads)


def test_over_two_axes():
    assert [f.times for f in factors(over_one_of_two, axes=("a", "b"))] == [4, 4]


# Right as they are, or wrong in a way that nobody can read: no sum is said of any.
NOT_SAID = {
    "shares": (lambda s, b: psum(local(s, b, lambda p, b: errors(p, b).sum() / 8)[1]), "mean"),
    "shares of real examples": (lambda s, b: psum(local(s, b, by_examples)[1]), "mean"),
    "shares, with a scan": (lambda s, b: psum(summed_in_a_scan(
        s, b, lambda p, b: errors(p, b).sum() / 8)), "mean"),
    "divided before": (lambda s, b: psum(divide(local(s, b)[1], 4)), "mean"),
    "divided after": (lambda s, b: divide(psum(local(s, b)[1]), 4), "mean"),
    "times a quarter": (lambda s, b: jax.tree.map(
        lambda g: 0.25 * g, psum(local(s, b)[1])), "mean"),
    "divided in the loss": (lambda s, b: psum(local(
        s, b, lambda p, b: mse(p, b) / tx.axis_size("data"))[1]), "mean"),
    "divided inside of the mean": (lambda s, b: psum(local(
        s, b, lambda p, b: jnp.mean(errors(p, b) / tx.axis_size("data")))[1]), "mean"),
    "divided inside of the model": (lambda s, b: psum(local(s, b, lambda p, b: jnp.mean(
        b["w"] * (errors(p, b) / tx.axis_size("data"))))[1]), "not read"),
    "example_mean divided": (lambda s, b: psum(divide(local(s, b, masked)[1], 4)), "mean"),
    "half a mean": (lambda s, b: psum(local(s, b, lambda p, b: 0.5 * mse(p, b))[1]), "not read"),
    "weights of the host": (lambda s, b: psum(local(
        s, b, lambda p, b: (errors(p, b) * b["w"]).sum())[1]), "not read"),
    "times a learnt factor": (lambda s, b: psum(local(
        s, b, lambda p, b: s.extra["a"] * mse(p, b))[1]), "not read"),
    "divided by a count": (lambda s, b: divide(psum(local(
        s, b, lambda p, b: errors(p, b).sum())[1]), count_of(b)), "not read"),
    "a root of the mean": (lambda s, b: psum(local(
        s, b, lambda p, b: jnp.sqrt(mse(p, b)))[1]), "not read"),
    "clipped": (lambda s, b: tx.optim.clip_by_global_norm(psum(local(s, b)[1]), 0.5), "not read"),
    "by hand": (lambda s, b: psum({"b": b["y"].mean(), "w": b["x"].mean(0)}), "not read"),
    "a mean by hand": (lambda s, b: tx.pmean({"b": b["y"].mean(), "w": b["x"].mean(0)}, "data"),
                       "mean"),
    "half a mean, averaged": (lambda s, b: tx.pmean(local(
        s, b, lambda p, b: 0.5 * mse(p, b))[1], "data"), "mean"),
    "twice the sum": (lambda s, b: jax.tree.map(
        lambda g: 2 * g, psum(local(s, b)[1])), "not read"),
    "a while loop": (lambda s, b: lax.while_loop(lambda c: c[0] < 2, lambda c: (
        c[0] + 1, jax.tree.map(jnp.add, c[1], psum(local(s, b)[1]))),
        (0, jax.tree.map(jnp.zeros_like, s.stored_params)))[1], "not read"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_SAID)
def test_what_is_not_a_sum_of_means(name):
    step, wanted = NOT_SAID[name]
    assert {f.factor for f in factors(gradient_of(step))} == {wanted}


def test_half_a_mean_on_two_devices_is_no_share():
    read = factors(gradient_of(NOT_SAID["half a mean"][0]), 2)
    assert {f.factor for f in read} == {"not read"}


@pytest.mark.parametrize("name", RIGHT if ALL else [*RIGHT][::8])
def test_no_right_step_is_a_sum(name):
    step, *_, axes = RIGHT[name]
    for n in (2, 4) if ALL else (4,):
        assert {f.factor for f in factors(step, n, axes)} <= {"mean", "not read"}


def test_a_decay_in_a_sum_of_shares_is_named():
    def loss(params, batch):
        return errors(params, batch).sum() / 8 + decay(params)

    def step(reduce):
        return gradient_of(lambda s, b: reduce(local(s, b, loss)[1]))

    assert [f.shared_term for f in factors(step(psum))] == [True, True]
    assert [f.shared_term for f in factors(step(lambda g: tx.pmean(g, "data")))] == [False, False]
    text = audited(step(psum)).verdict()
    assert "a term that is the same on every device summed once for each of them" in text


def audited(step):
    engine = guard_data.engine(4)
    return engine.audit(tx.step_fn(step), engine.create_state(PARAMS, EXTRA), BATCH)


def test_the_audit_says_it():
    report = audited(gradient_of(SUMMED["psum"]))
    assert not report.ok
    assert not report.exact
    line = report.plan[0]
    assert (line.factor, line.ok, line.found_bytes) == ("sum", False, line.payload_bytes)
    assert "failed: the plan predicts the mean of the gradients, found the sum" in str(report)
    assert "4 times that, of params['b'] and 1 more at test_gradient_factors.py:" in str(report)
    assert "as the plan predicts" not in str(report)


def test_the_audit_says_that_a_factor_is_not_read():
    report = audited(gradient_of(NOT_SAID["half a mean"][0]))
    assert report.ok
    assert report.plan[0].factor == "not read"
    assert "as the plan predicts, the factor of the gradients not read (params['b']" in str(report)


def plant(monkeypatch):
    """Sum where the plan's own reduction averages."""
    monkeypatch.setattr(
        "txcore.train.state.state.sync_gradients",
        lambda grads, axes, *, name, **_: (tx.psum(grads, axes, name=name), None),
    )


def mnist_report(model, precision):
    layers = models.layers_of(model)
    engine = tx.Engine(
        mesh=tx.MeshSpec(jax.devices()[:4]),
        plan=tx.Plan(data_parallel=tx.DP("data")),
        optimizer=tx.optim.sgd(0.1),
        precision=precision,
    )
    batch = {
        "image": np.zeros((8, 28, 28, 1), np.float32),
        "label": np.zeros(8, np.int32),
        "weight": np.ones(8, np.float32),
    }
    step, _ = train.make_steps(layers)
    return engine.audit(step, engine.create_state(models.init(layers, 0)), batch)


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("model", models.MODELS if ALL else ["mlp", "dropout-cnn"])
def test_mnists_step(model, precision, monkeypatch):
    if not ALL and (model, precision) not in (("mlp", "float16"), ("dropout-cnn", "float32")):
        pytest.skip("TXCORE_ALL_GUARDS=1 audits every model in every precision")
    assert mnist_report(model, precision).plan[0].factor == "mean"
    plant(monkeypatch)
    report = mnist_report(model, precision)
    assert (report.plan[0].factor, report.ok) == ("sum", False)


@pytest.mark.parametrize(
    "step, engine",
    [
        (toys.train_step, toys.engine),
        (float16_steps.train_step, float16_steps.engine),
        (float16_steps.train_step, lambda n: toys.engine(n, precision="bfloat16")),
    ],
    ids=["example_mean", "float16", "bfloat16"],
)
def test_planted_in_a_step(step, engine, monkeypatch):
    plant(monkeypatch)
    made = engine(4)
    report = made.audit(step, made.create_state(toys.params()), toys.batch(masked=3))
    assert (report.plan[0].factor, report.ok) == ("sum", False)
