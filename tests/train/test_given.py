"""What state.replace, a step and their options are given: accepted with its meaning, or named."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import txcore as tx

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
BATCH = {"x": X, "y": X.sum(1)}
W = {"w": np.ones(3, np.float32)}


@tx.step_fn
def step(state, batch):
    def loss_of(p):
        return jnp.mean((batch["x"] @ p["w"] - batch["y"]) ** 2)

    loss, grads = tx.value_and_grad(loss_of)(state.params)
    grads, state = state.sync_gradients(grads)
    return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}


@pytest.fixture(scope="module")
def engine():
    return toys.engine(2)


def says(error, text):
    return pytest.raises(error, match=f"^{re.escape(text)}")


def test_numbers_of_the_other_byte_order(engine):
    other = {name: x.astype(">f4") for name, x in BATCH.items()}
    a, _ = step(engine.create_state({"w": W["w"].astype(">f4")}), other)
    b, _ = step(engine.create_state(W), BATCH)
    np.testing.assert_array_equal(a.stored_params["w"], b.stored_params["w"])


ROWS = (
    ": lists and tuples are taken apart, so write numpy.asarray; what is the same for all examples "
)


@pytest.mark.parametrize(
    "batch, error, text",
    [
        (
            {**BATCH, "y": [1.0] * 8},
            ValueError,
            "batch['y'][0] needs to be an array with one row for each example, got a Python float",
        ),
        (
            {**BATCH, "y": (1, 2)},
            ValueError,
            "batch['y'][0] needs to be an array with one row for each example, got a Python "
            f"int{ROWS}",
        ),
        (
            {**BATCH, "rate": np.float32(0.5)},
            ValueError,
            "batch['rate'] needs to be an array with one row for each example, got a scalar array",
        ),
        (
            {**BATCH, "name": np.array(["a"] * 8)},
            TypeError,
            "batch['name'] needs numbers, got <U1: encode it, or leave it out of the batch",
        ),
    ],
)
def test_leaves_of_a_batch(batch, error, text, engine):
    with says(error, text):
        step(engine.create_state(W), batch)
    with says(error, text):
        engine.fit(step, engine.create_state(W), [batch], steps=1)


STACKED = {name: np.stack([x, x]) for name, x in BATCH.items()}


@pytest.mark.parametrize(
    "transformed",
    [
        lambda e: jax.jit(step)(e.create_state(W), BATCH),
        lambda e: jax.jit(lambda b: step(e.create_state(W), b))(BATCH),
        lambda e: jax.vmap(step, in_axes=(None, 0))(e.create_state(W), STACKED),
        lambda e: jax.lax.scan(step, e.create_state(W), STACKED),
        lambda e: jax.grad(
            lambda w: step(e.create_state(W).replace(stored_params={"w": w}), BATCH)[1]["loss"]
        )(W["w"]),
        lambda e: jax.jit(lambda s, b: e.run(step, s, b))(e.create_state(W), BATCH),
    ],
    ids=["jit", "jit of the batch", "vmap", "scan", "grad", "engine.run"],
)
def test_a_step_under_a_transformation(transformed, engine):
    with pytest.raises(TypeError) as refused:
        transformed(engine)
    assert re.fullmatch(
        r"step needs arrays, got \w+Tracer: a step is compiled by its engine and cannot be called "
        r"under jax.jit, vmap, grad or scan, nor inside a step\. Call it in a Python loop \(the "
        r"devices are not waited for\)",
        str(refused.value),
    )


def test_a_step_within_a_step_and_other_calls_while_tracing(engine):
    def outer(state, batch):
        return step(state, batch)

    with says(TypeError, "step needs arrays, got "):
        tx.step_fn(outer)(engine.create_state(W), BATCH)
    with says(TypeError, "read needs arrays, got "):

        def read(state, batch):
            return {"x": tx.pmean(batch["x"].mean(), "data")}

        jax.jit(lambda b: engine.evaluate(read, engine.create_state(W), [b]))(BATCH)
    with says(TypeError, "create_state needs arrays, got DynamicJaxprTracer, which stands for one"):
        jax.jit(lambda w: engine.create_state({"w": w}).step)(W["w"])


def test_no_jit(engine):
    state = toys.engine(2).create_state(W)
    text = "step needs to be compiled, and jax_disable_jit is set: unset it (JAX_DISABLE_JIT=0, or"
    with jax.disable_jit(), says(RuntimeError, text):
        step(state, BATCH)


class TestReplace:
    def test_step_and_seed(self, engine):
        for seven in (7, np.int64(7), jnp.int32(7), np.asarray(7)):
            state, _ = step(engine.create_state(W).replace(step=seven, seed=np.int32(3)), BATCH)
            assert (int(state.step), int(state.seed)) == (8, 3)
            assert (state.step.dtype, state.seed.dtype) == (np.int32, np.uint32)

    def test_arrays_of_the_host(self, engine):
        state = engine.create_state(W, extra={"mean": np.zeros(2), "n": 0})
        mine = jnp.ones(2)
        state = state.replace(extra={"mean": mine, "n": 3}, stored_params={"w": 2 * W["w"]})
        state, _ = step(state, BATCH)
        assert state.extra["mean"].tolist() == [1, 1]
        assert int(state.extra["n"]) == 3
        assert not mine.is_deleted()
        want, _ = step(engine.create_state({"w": 2 * W["w"]}), BATCH)
        np.testing.assert_array_equal(state.stored_params["w"], want.stored_params["w"])

    @pytest.mark.parametrize(
        "changes, error, text",
        [
            ({"step": 7.5}, TypeError, "state.replace needs step= a whole number, got 7.5"),
            ({"step": True}, TypeError, "state.replace needs step= a whole number, got True"),
            (
                {"seed": -1},
                ValueError,
                "state.replace needs another seed=: Python integer -1 out of",
            ),
            (
                {"params": W},
                TypeError,
                "state.replace knows the fields step, stored_params, opt_state, seed, extra, "
                "loss_scaling, comm_state, got params: write stored_params=",
            ),
            (
                {"extra": {"a": "b"}},
                TypeError,
                "state.replace needs arrays, got str at state.extra['a']: convert it with numpy.as",
            ),
            (
                {"stored_params": {"w": [1.0, 1.0, 1.0]}},
                ValueError,
                "state.replace needs stored_params= with the leaves [(\"['w']\", (3,))], got "
                "(\"['w'][0]\", ()): make another state for other parameters",
            ),
            (
                {"stored_params": {}},
                ValueError,
                "state.replace needs stored_params= with the leaves [(\"['w']\", (3,))], got a ",
            ),
            (
                {"stored_params": None},
                ValueError,
                "state.replace needs stored_params= with the leaves [(\"['w']\", (3,))], got None",
            ),
            (
                {"loss_scaling": {}},
                ValueError,
                "state.replace needs loss_scaling= as it is, None, got another structure: it is "
                "that of the engine's precision and on_nonfinite=",
            ),
            (
                {"comm_state": {"errors": np.zeros(3)}},
                ValueError,
                "state.replace needs comm_state= as it is, None, got (\"['errors']\", (3,)): what "
                "communication keeps is that of the engine's plan",
            ),
        ],
    )
    def test_refused(self, changes, error, text, engine):
        with says(error, text):
            engine.create_state(W).replace(**changes)


@pytest.mark.parametrize(
    "field, remedy",
    [
        ("opt_state", "begin anew by opt_state=engine.optimizer.init(params)"),
        ("comm_state", "take it of a new state (engine.create_state(params).comm_state)"),
    ],
)
@pytest.mark.parametrize("value, named", [(None, "None"), ({}, "a leaf less")])
def test_what_a_state_keeps_is_not_left_out(field, remedy, value, named):
    plan = tx.Plan(data_parallel=tx.DP("data", compression="int8"))
    engine = tx.Engine(
        mesh=tx.MeshSpec(jax.devices()[:2]), plan=plan, optimizer=tx.optim.adamw(0.1)
    )
    state = engine.create_state(W)
    with pytest.raises(ValueError, match=re.escape(f"], got {named}: ")) as found:
        state.replace(**{field: value})
    assert f"state.replace needs {field}= with the leaves [(" in str(found.value)
    assert remedy in str(found.value)
    state.replace(**{field: getattr(engine.create_state(W), field)})


def test_whole_numbers_of_every_kind(engine, tmp_path):
    for four in (4, np.int64(4), np.asarray(4), jnp.int32(4)):
        state = engine.create_state(W)
        state = engine.fit(
            *(step, state, [BATCH]),
            **{"steps": four, "evaluate": lambda s: {}, "eval_every": np.int32(2)},
        )
        assert int(state.step) == 4
        assert tx.Checkpoints(tmp_path, every=four, keep=four).every == 4
        assert tx.optim.cosine(0.1, four, np.int64(1))(4) == 0
        tx.loggers.Basic(every=four)
        assert toys.engine(1, seed=four).seed == 4
    assert tx.LossScale(growth_interval=np.int64(5)).growth_interval == 5
    for wrong in (True, 4.0, "4", None, np.ones(2)):
        with says(ValueError, "fit needs steps= or epochs= a count from 0 on, got "):
            engine.fit(
                step,
                engine.create_state(W),
                [BATCH],
                **{"steps": wrong} if wrong is not None else {"epochs": "x"},
            )
        with says(ValueError, "Checkpoints needs every= a count from 1 on, got "):
            tx.Checkpoints(tmp_path, every=wrong)
        with says(ValueError, "cosine: total_steps needs an int of at least 1, got "):
            tx.optim.cosine(0.1, wrong)


def test_rates_without_dims(engine):
    want, _ = step(toys.engine(2, optimizer=tx.optim.sgd(0.125)).create_state(W), BATCH)
    for rate in (np.float32(0.125), np.asarray(0.125), jnp.asarray(0.125), np.float64(0.125)):
        state, _ = step(toys.engine(2, optimizer=tx.optim.sgd(rate)).create_state(W), BATCH)
        np.testing.assert_array_equal(state.stored_params["w"], want.stored_params["w"])
        assert tx.optim.constant(rate)(0) == 0.125
    with says(TypeError, "sgd: learning_rate needs a number or a schedule (step -> float32 scalar"):
        tx.optim.sgd(np.ones(2))
    with says(ValueError, "sgd: learning_rate needs a finite number of at least 0, got nan"):
        tx.optim.sgd(np.asarray(np.nan))
    with says(ValueError, "sgd: momentum needs a finite number in [0, 1), got array(1.5)"):
        tx.optim.sgd(0.1, momentum=np.asarray(1.5))
