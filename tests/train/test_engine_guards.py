"""What the engine refuses before anything runs, and in which words."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import txcore as tx


def step_of(body):
    """A step whose body is `body(state, batch, loss, grads)`."""

    @tx.step_fn
    def train_step(state, batch):
        loss, grads = tx.value_and_grad(toys.local_loss)(state.params, batch)
        return body(state, batch, loss, grads)

    return train_step


def ok(state, loss, grads):
    return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}


def forgotten(state, batch, loss, grads):
    return ok(state, loss, grads)


def doubled(state, batch, loss, grads):
    grads = tx.pmean(grads, "data", name="grads")
    return ok(state, loss, tx.pmean(grads, "data", name="grads"))


def psum_after_all_gather(state, batch, loss, grads):
    everyone = tx.all_gather(batch["y"], "data")
    total = tx.psum(jnp.sum(everyone**2), "data", name="total")
    return state.replace(step=state.step + 1), {"total": total}


def reduce_scatter_of_an_invariant(state, batch, loss, grads):
    grads = tx.pmean(grads, "data")
    return ok(state, loss, tx.reduce_scatter(grads, "data", name="grads"))


def unreduced_metric(state, batch, loss, grads):
    return state.apply_gradients(grads=tx.pmean(grads, "data")), {"loss": loss}


def missing_leaf(state, batch, loss, grads):
    grads = tx.pmean(grads, "data")
    return ok(state, loss, {"w1": grads["w1"]})


def wrong_shape(state, batch, loss, grads):
    grads = tx.pmean(grads, "data")
    return ok(state, loss, {**grads, "w1": grads["w1"].T})


def no_state(state, batch, loss, grads):
    return {"loss": tx.pmean(loss, "data")}


def varying_extra(state, batch, loss, grads):
    state = state.replace(extra=batch["x"].sum())
    return ok(state, loss, tx.pmean(grads, "data"))


def other_dtype(state, batch, loss, grads):
    state = state.replace(extra=jnp.int32(0))
    return ok(state, loss, tx.pmean(grads, "data"))


BAD = [
    (
        forgotten,
        ValueError,
        "apply_gradients needs reduced gradients: the gradient of params['w1'] varies along axis "
        "'data', so it was never reduced there (test_engine_guards.py:26). Write grads = "
        "tx.pmean(grads, 'data'), or grads, state = state.sync_gradients(grads), before "
        "apply_gradients",
    ),
    (
        doubled,
        ValueError,
        "tx.pmean over axis 'data': grads['w1'] does not vary along it (test_engine_guards.py:35): "
        "it is reduced already, or the same on every device. Another reduction would change "
        "nothing: remove one. If it is meant all the same, reduce tx.vary(x, 'data')",
    ),
    (
        psum_after_all_gather,
        ValueError,
        "psum/total over axis 'data' (test_engine_guards.py",
    ),
    (
        psum_after_all_gather,
        ValueError,
        "reduces a value that tx.all_gather made equal on every device, which multiplies it by 2. "
        "Remove the reduction",
    ),
    (
        reduce_scatter_of_an_invariant,
        ValueError,
        "tx.reduce_scatter over axis 'data': grads['w1'] does not vary along it",
    ),
    (
        unreduced_metric,
        ValueError,
        "metrics['loss'] varies along axis 'data': it is one device's value, not the global one. "
        "Report tx.pmean(..., 'data') of a mean, tx.psum(..., 'data') of a count",
    ),
    (
        missing_leaf,
        ValueError,
        "apply_gradients needs gradients with the structure of the parameters",
    ),
    (
        wrong_shape,
        ValueError,
        "apply_gradients needs the gradient of params['w1'] in its shape (4, 8), got (8, 4)",
    ),
    (
        no_state,
        TypeError,
        "train_step needs to return (state, metrics), the state that apply_gradients returned and "
        "a dict, got dict: run a step that returns metrics only with engine.evaluate",
    ),
    (
        varying_extra,
        ValueError,
        "train_step needs to return a state that is the same on every device, but state.extra "
        "varies along axis 'data': reduce it, for example with tx.pmean",
    ),
    (
        other_dtype,
        ValueError,
        "train_step needs to return state.extra as float32[], as it was given, got int32[]",
    ),
]


@pytest.mark.parametrize("body,error,text", BAD, ids=[b.__name__ for b, _, _ in BAD])
def test_a_wrong_step_is_refused(body, error, text):
    engine = toys.engine(2)
    state = engine.create_state(toys.params(), extra=np.float32(0))
    with pytest.raises(error, match=re.escape(text)):
        step_of(body)(state, toys.batch())
    assert not state.step.is_deleted()  # nothing ran


def test_pmean_in_the_loss_and_again_on_the_gradients():
    @tx.step_fn
    def step(state, batch):
        def reduced(params):
            return tx.pmean(toys.local_loss(params, batch), "data", name="loss")

        loss, grads = tx.value_and_grad(reduced)(state.params)
        grads = tx.pmean(grads, "data")
        return state.apply_gradients(grads=grads), {"loss": loss}

    engine = toys.engine(2)
    text = (
        "tx.value_and_grad needs a loss that is local along data axis 'data', but the loss does "
        "not vary along it (test_engine_guards.py:160): it is reduced or gathered already, and "
        "tx.pmean of its gradients would give 1/2 of the truth. Return the local loss, and apply "
        "tx.pmean(..., 'data') to loss and gradients afterwards"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        step(engine.create_state(toys.params()), toys.batch())


def test_a_loss_made_invariant_by_a_gather_is_refused():
    def loss_of(params, batch):
        losses = tx.all_gather(toys.losses(params, batch), "data", invariant=True)
        return losses.mean()

    @tx.step_fn
    def gathered(state, batch):
        loss, grads = tx.value_and_grad(loss_of)(state.params, batch)
        return ok(state, loss, grads)

    engine = toys.engine(2)
    with pytest.raises(ValueError, match="it is reduced or gathered already"):
        gathered(engine.create_state(toys.params()), toys.batch())


def test_a_contrastive_loss_may_gather():
    """Gathering the others' embeddings is no reduction: the loss still varies."""

    @tx.step_fn
    def step(state, batch):
        def loss_of(params):
            mine = batch["x"] @ params["w1"]
            others = tx.all_gather(mine, "data", name="embeddings")
            return jax.nn.logsumexp(mine @ others.T, axis=1).mean()

        loss, grads = tx.value_and_grad(loss_of)(state.params)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}

    results = []
    for n in (1, 4):
        engine = toys.engine(n)
        state, metrics = step(engine.create_state(toys.params()), toys.batch())
        results.append((np.asarray(state.params["w1"]), float(metrics["loss"])))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5)


def test_synchronised_batch_statistics():
    """A reduction inside a loss, followed by vary: right gradients, nothing left to autodiff."""

    @tx.step_fn
    def step(state, batch):
        def loss_of(params):
            hidden = batch["x"] @ params["w1"]
            mean = tx.vary(tx.pmean(hidden.mean(0), "data", name="bn"), "data", name="bn")
            return ((hidden - mean) ** 2 @ params["w2"] ** 2).mean()

        loss, grads = tx.value_and_grad(loss_of)(state.params)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}

    results = []
    for n in (1, 4):
        engine = toys.engine(n)
        state = engine.create_state(toys.params())
        report = engine.audit(step, state, toys.batch())
        assert report.exact
        state, _ = step(state, toys.batch())
        results.append(np.asarray(state.params["w1"]))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-6)


CALLS = [
    (
        lambda: (
            toys.engine(3)
            and toys.train_step(toys.engine(3).create_state(toys.params()), toys.batch(64))
        ),
        ValueError,
        "batch['mask'] has 64 examples, which 3 devices along axis 'data' cannot share equally: "
        "use a size divisible by 3, or pad it (and set the mask)",
    ),
    (
        lambda: toys.engine(2, plan=tx.Plan(data_parallel=tx.DP(axis="batch"))),
        ValueError,
        "Plan(data_parallel=DP(axis='batch')) needs mesh axis 'batch', but the mesh's axes are "
        "'data': use one of them, or name the axis in MeshSpec(axes=...)",
    ),
    (
        lambda: toys.engine(2, precision="float8"),
        ValueError,
        "precision needs to be one of 'float32', 'bfloat16', 'float16', got 'float8'",
    ),
    (
        lambda: toys.engine(2, seed=-1),
        ValueError,
        "Engine needs seed= an int from 0 to 2**32 - 1, got -1",
    ),
    (
        lambda: tx.Engine(mesh=jax.devices(), plan=tx.Plan(), optimizer=tx.optim.sgd(0.1)),
        TypeError,
        "Engine needs mesh= a tx.MeshSpec, got list: write tx.MeshSpec(devices=..., axes=...",
    ),
    (
        lambda: tx.Engine(mesh=toys.mesh(2), plan="dp", optimizer=tx.optim.sgd(0.1)),
        TypeError,
        "Engine needs plan= a tx.Plan, got str",
    ),
    (
        lambda: toys.engine(2).create_state({"w": "three"}),
        TypeError,
        "create_state needs arrays, got str at params['w']",
    ),
    (
        lambda: toys.train_step(toys.params(), toys.batch()),
        TypeError,
        "train_step needs a state made by engine.create_state(params), got dict",
    ),
    (
        lambda: toys.engine(2).evaluate(
            toys.eval_step, toys.engine(2).create_state(toys.params()), [toys.batch()]
        ),
        ValueError,
        "this engine runs states that its create_state made, got another",
    ),
    (
        lambda: tx.step_fn(3),
        TypeError,
        "tx.step_fn needs a function (state, batch), got 3",
    ),
    (
        lambda: toys.engine(1).create_state(toys.params()).apply_gradients(grads=toys.params()),
        RuntimeError,
        "state.apply_gradients needs to be called inside a step decorated with @tx.step_fn",
    ),
    (
        lambda: tx.value_and_grad(lambda w: w)(1.0),
        ValueError,
        "tx.value_and_grad needs axis= the data axes outside a step decorated with @tx.step_fn",
    ),
    (lambda: tx.DP(axis=()), ValueError, "DP needs axis= a mesh axis name or a tuple of different"),
    (
        lambda: tx.Plan(data_parallel=tx.DP("data"), batch={"x": jax.P("model")}).validate(
            toys.mesh(2)
        ),
        ValueError,
        "Plan(batch={'x': ...}) needs mesh axis 'model', but the mesh's axes are 'data'",
    ),
    (
        lambda: toys.engine(1).fit(toys.train_step, None, [], steps=1, epochs=1),
        ValueError,
        "fit needs one of steps= and epochs=, got steps=1 and epochs=1",
    ),
    (
        lambda: toys.engine(1).fit(toys.train_step, None, [], steps=-1),
        ValueError,
        "fit needs steps= or epochs= a count from 0 on, got -1",
    ),
    (
        lambda: toys.engine(1).fit(toys.train_step, None, [], steps=1, eval_every=5),
        ValueError,
        "fit needs eval_every= at least 1 and evaluate= with it, got eval_every=5",
    ),
    (
        lambda: tx.value_and_grad(toys.local_loss, axis="data")(params=toys.params()),
        NameError,
        "tx.value_and_grad needs mesh axis 'data', but no mesh axis is bound here",
    ),
    (
        lambda: toys.engine(2, precision=jnp.bfloat16),
        ValueError,
        "precision needs to be one of 'float32', 'bfloat16', 'float16', got <class",
    ),
    (
        lambda: tx.MeshSpec(devices=[jax.devices()[0]] * 2),
        ValueError,
        "MeshSpec needs each device once, got devices=",
    ),
    (lambda: tx.loggers.Basic(every=0), ValueError, "Basic needs every= at least 1, got 0"),
]


@pytest.mark.parametrize("call,error,text", CALLS, ids=[t[:40] for _, _, t in CALLS])
def test_bad_calls(call, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call()


def test_arguments_to_differentiate_by_position():
    @tx.step_fn
    def step(state, batch):
        tx.value_and_grad(lambda p: 0.0)(p=state.params)

    engine = toys.engine(2)
    with pytest.raises(TypeError, match=r"by position, got keyword arguments only: p"):
        step(engine.create_state(toys.params()), toys.batch())


def test_a_donated_state_is_named():
    engine = toys.engine(2)
    state = engine.create_state(toys.params())
    toys.train_step(state, toys.batch())
    with pytest.raises(ValueError, match="the state given to train_step was donated to an earlier"):
        toys.train_step(state, toys.batch())


def test_evaluate_refuses_what_is_no_metric():
    engine = toys.engine(2)
    state = engine.create_state(toys.params())
    with pytest.raises(TypeError, match=r"engine\.evaluate needs a step that returns a dict"):
        engine.evaluate(lambda s, b: (s, {}), state, [toys.batch()])
    with pytest.raises(ValueError, match="needs at least one real example, got none in data"):
        engine.evaluate(toys.eval_step, state, [])
    with pytest.raises(ValueError, match=re.escape("metrics['loss'] varies along axis 'data'")):
        engine.evaluate(lambda s, b: {"loss": b["x"].mean()}, state, [toys.batch()])


def test_keys_of_a_microbatch_are_refused():
    @tx.step_fn
    def step(state, batch):
        state.example_keys(batch["x"][:4])
        return state, {}

    engine = toys.engine(2)
    text = (
        "state.example_keys needs the whole batch of this device, 8 examples, got leading dims "
        "[(4,)]: make the keys before splitting the batch into microbatches"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        step(engine.create_state(toys.params()), toys.batch())


def test_a_layout_for_a_leaf_that_the_batch_lacks():
    plan = tx.Plan(data_parallel=tx.DP("data"), batch={"nope": jax.P()})
    engine = toys.engine(2, plan=plan)
    text = (
        "Plan(batch=...) declares 'nope', but the batch has 'mask', 'x', 'y' at its top: name those"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        toys.train_step(engine.create_state(toys.params()), toys.batch())


def test_gradients_that_autodiff_summed_are_refused():
    """Differentiating state.stored_params: jax sums the gradients by itself, silently N times."""

    @tx.step_fn
    def step(state, batch):
        loss, grads = jax.value_and_grad(toys.local_loss)(state.stored_params, batch)
        return ok(state, loss, grads)

    engine = toys.engine(2)
    text = "autodiff put a psum of 8 elements over axis 'data' into the backward pass (toys.py:"
    with pytest.raises(ValueError, match=re.escape(text)):
        step(engine.create_state(toys.params()), toys.batch())
    one = toys.engine(1)
    step(one.create_state(toys.params()), toys.batch())  # one device has nothing to sum


def psum_of(v):
    return tx.vary(tx.psum(v, "data", name="total"), "data")


def alike(found):
    return tx.pmax(found, "data")


def by_cond(select):
    """A metric that only the first device computes; `select(predicate, x)` chooses how."""

    def body(state, batch, loss, grads):
        value = select(tx.axis_index("data") == 0, batch["x"].sum())
        metrics = {"loss": tx.pmean(loss, "data"), "value": tx.pmean(value, "data")}
        return state.apply_gradients(grads=tx.pmean(grads, "data")), metrics

    return body


def lying(cast):
    def select(first, x):
        return tx.vary(jax.lax.cond(first, lambda v: 2 * v, lambda v: 3 * v, cast(1.0)), "data")

    return by_cond(select)


DIVERGING = [
    (
        by_cond(lambda first, x: jax.lax.cond(first, psum_of, lambda v: v, x)),
        by_cond(lambda first, x: jnp.where(first, psum_of(x), x)),
        r"^psum/total over data at test_engine_guards\.py:\d+ inside the cond at "
        r"test_engine_guards\.py:\d+, whose predicate differs along axis 'data': all devices of "
        r"its group would wait for those that do not come\. Compute it on every device and select "
        r"with jax\.numpy\.where \(or jax\.lax\.select\), or make the predicate the same on every "
        r"device first: tx\.pmax\(predicate, 'data'\)$",
    ),
    (
        by_cond(
            lambda first, x: jax.lax.while_loop(lambda c: c < 9, lambda c: c + psum_of(x) ** 2, x)
        ),
        by_cond(
            lambda first, x: jax.lax.while_loop(
                lambda c: alike(c < 9), lambda c: c + psum_of(x) ** 2, x
            )
        ),
        "psum/total over data at .* inside the while at",
    ),
    (
        by_cond(
            lambda first, x: jax.lax.cond(
                first, lambda v: tx.shift(v, "data", name="ring"), lambda v: v, x
            )
        ),
        by_cond(
            lambda first, x: jax.lax.cond(
                alike(first),
                lambda v: tx.shift(v, "data", name="ring"),
                lambda v: v,
                x,
            )
        ),
        "^shift/ring over data at .*: all devices would wait for those that do not come",
    ),
    (
        lying(lambda w: w),
        lying(lambda w: tx.vary(jnp.float32(w), "data")),
        r"^an output of the cond at test_engine_guards\.py:\d+ is typed as the same along axis "
        r"'data', along which its predicate differs: the devices hold different values, and "
        r"gradients through it come out wrong\. Cast what goes in first: tx\.vary\(x, 'data'\) of "
        r"each operand or initial value that the output is made of$",
    ),
]


@pytest.mark.parametrize("bad,good,text", DIVERGING, ids=["cond", "while", "permute", "lie"])
def test_diverging_predicates_are_refused_and_the_advice_works(bad, good, text):
    engine = toys.engine(2)
    state = engine.create_state(toys.params())
    with pytest.raises(ValueError, match=text):
        step_of(bad)(state, toys.batch())
    assert not state.step.is_deleted()  # nothing ran
    _, metrics = step_of(good)(state, toys.batch())
    assert np.isfinite(metrics["value"])


def test_diverging_predicates_are_refused_in_evaluation_too():
    def eval_step(state, batch):
        first, x = tx.axis_index("data") == 0, batch["x"].sum()
        return {"x": tx.pmean(jax.lax.cond(first, psum_of, lambda v: v, x), "data")}

    engine = toys.engine(2)
    with pytest.raises(ValueError, match="inside the cond at"):
        engine.evaluate(eval_step, engine.create_state(toys.params()), [toys.batch()])
    engine = toys.engine(1)  # one device has nobody to wait for
    assert engine.evaluate(eval_step, engine.create_state(toys.params()), [toys.batch()])
