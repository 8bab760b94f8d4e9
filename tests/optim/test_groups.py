"""Parameter groups, decay masks and as_optax, against optax itself."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import txcore as tx

pytestmark = [pytest.mark.usefixtures("unoptimized"), pytest.mark.sampled(2)]

STEPS = 12
SHAPES = {
    "conv": {"w": (3, 3, 2, 4), "b": (4,)},
    "layers": [{"w": (4, 4)}, {"w": (4, 2)}],
    "scale": (),
}
NAMES = ["conv/b", "conv/w", "layers/0/w", "layers/1/w", "scale"]


def tree(seed, dtype=jnp.float32):
    random = np.random.default_rng(seed)
    make = lambda shape: jnp.asarray(random.normal(size=shape), dtype)  # noqa: E731
    return jax.tree.map(make, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def labels(*rules):
    """A tree of the first rule that each parameter matches, written out by hand."""
    return jax.tree.unflatten(jax.tree.structure(tree(0)), rules)


def run(optimizer, params, steps=STEPS):
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        params, state = update(tree(step + 1), state, params, step=jnp.int32(step))
    return params, state


def run_optax(transformation, params, steps=STEPS):
    state = transformation.init(params)
    update = jax.jit(transformation.update)
    for step in range(steps):
        changes, state = update(tree(step + 1), state, params)
        params = optax.apply_updates(params, changes)
    return params


def assert_close(got, want, rtol=2e-5, atol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


def clipped(max_norm, transformation):
    return optax.chain(optax.clip_by_global_norm(max_norm), transformation)


THREE = ("b", "w", "w", "w", "rest")
GROUPS = {
    "three": (
        tx.optim.groups(
            {
                "*/b": tx.optim.sgd(0.1),
                "*/w": tx.optim.adamw(0.01, weight_decay=0.1),
                "*": tx.optim.sgd(0.2, momentum=0.9, nesterov=True),
            }
        ),
        optax.multi_transform(
            {
                "b": optax.sgd(0.1),
                "w": optax.adamw(0.01, weight_decay=0.1),
                "rest": optax.sgd(0.2, momentum=0.9, nesterov=True),
            },
            labels(*THREE),
        ),
    ),
    "schedules": (
        tx.optim.groups(
            {
                "layers/0/*": tx.optim.sgd(tx.optim.cosine(0.1, STEPS), momentum=0.9),
                "*": tx.optim.adamw(tx.optim.cosine(0.01, STEPS)),
            }
        ),
        optax.multi_transform(
            {
                "first": optax.sgd(optax.cosine_decay_schedule(0.1, STEPS), momentum=0.9),
                "rest": optax.adamw(optax.cosine_decay_schedule(0.01, STEPS), weight_decay=0.01),
            },
            labels("rest", "rest", "first", "rest", "rest"),
        ),
    ),
    "a group clipped by its own norm": (
        tx.optim.groups({"*/w": tx.optim.sgd(0.1, clip_norm=0.5), "*": tx.optim.sgd(0.1)}),
        optax.multi_transform(
            {"w": clipped(0.5, optax.sgd(0.1)), "rest": optax.sgd(0.1)},
            labels("rest", "w", "w", "w", "rest"),
        ),
    ),
    "all clipped by one norm": (
        tx.optim.groups(
            {"*/w": tx.optim.sgd(0.1, momentum=0.9), "*": tx.optim.adamw(0.01)}, clip_norm=0.5
        ),
        clipped(
            0.5,
            optax.multi_transform(
                {"w": optax.sgd(0.1, momentum=0.9), "rest": optax.adamw(0.01, weight_decay=0.01)},
                labels("rest", "w", "w", "w", "rest"),
            ),
        ),
    ),
    "ours, optax's, and one within another": (
        tx.optim.groups(
            {
                "conv/*": tx.optim.groups({"*/b": optax.adam(0.01), "*": tx.optim.sgd(0.1)}),
                "*": optax.lion(0.01),
            }
        ),
        optax.multi_transform(
            {"b": optax.adam(0.01), "w": optax.sgd(0.1), "rest": optax.lion(0.01)},
            labels("b", "w", "rest", "rest", "rest"),
        ),
    ),
}


@pytest.mark.parametrize("ours, theirs", GROUPS.values(), ids=GROUPS)
def test_groups_equal_optax_multi_transform(ours, theirs):
    assert_close(run(ours, tree(0))[0], run_optax(theirs, tree(0)))


MATRICES = jax.tree.map(lambda p: p.ndim > 1, tree(0))
MASKS = {
    "a rule": "*/w",
    "rules": ["conv/w", "layers/*"],
    "a tree": MATRICES,
    "a prefix": {"conv": {"w": True, "b": False}, "layers": True, "scale": False},
    "a function": lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_decay_mask_equals_optax(mask):
    sgd = tx.optim.sgd(0.1, momentum=0.9, weight_decay=0.5, decay_mask=mask)
    decay = optax.add_decayed_weights(0.5, MATRICES)
    assert_close(run(sgd, tree(0))[0], run_optax(optax.chain(decay, optax.sgd(0.1, 0.9)), tree(0)))
    adamw = tx.optim.adamw(0.01, weight_decay=0.5, decay_mask=mask, clip_norm=1.0)
    theirs = clipped(1.0, optax.adamw(0.01, weight_decay=0.5, mask=MATRICES))
    assert_close(run(adamw, tree(0))[0], run_optax(theirs, tree(0)))


def test_a_mask_within_a_group_is_of_that_group():
    decayed = tx.optim.sgd(0.1, weight_decay=0.5, decay_mask=MATRICES)
    ours = tx.optim.groups({"conv/*": decayed, "*": tx.optim.sgd(0.1)})
    only = {**jax.tree.map(lambda _: False, MATRICES), "conv": {"w": True, "b": False}}
    theirs = optax.chain(optax.add_decayed_weights(0.5, only), optax.sgd(0.1))
    assert_close(run(ours, tree(0))[0], run_optax(theirs, tree(0)))


def test_a_flat_bucket_is_a_parameter_like_others():
    """A group whose one leaf is a packed bucket: the kernels update it as a whole."""
    params = tree(0)
    bucket = tx.kernels.pack(params["layers"])
    rate = {"flat/*": tx.optim.adamw(0.01), "*": tx.optim.sgd(0.1)}
    packed = {"flat": {"all": bucket}, "scale": params["scale"]}
    optimizer = tx.optim.groups(rate)
    grads = tree(1)
    given = {"flat": {"all": tx.kernels.pack(grads["layers"])}, "scale": grads["scale"]}
    new, _ = optimizer.update(given, optimizer.init(packed), packed, step=jnp.int32(0))
    apart = tx.optim.adamw(0.01)
    want, _ = apart.update(
        grads["layers"], apart.init(params["layers"]), params["layers"], step=jnp.int32(0)
    )
    got = tx.kernels.unpack(new["flat"]["all"], params["layers"])
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_grad_scale_reaches_every_group():
    optimizer = GROUPS["all clipped by one norm"][0]
    params = tree(0)
    state, grads = optimizer.init(params), tree(1)
    doubled = jax.tree.map(lambda g: 2 * g, grads)
    step = jnp.int32(0)
    want = optimizer.update(grads, state, params, step=step)
    assert_close(optimizer.update(doubled, state, params, step=step, grad_scale=0.5), want)


# In an engine: reduced gradients, float16, checkpoints.


def loss_of(params, batch):
    x = jnp.tanh(batch["x"].astype(params["dense"]["w"].dtype) @ params["dense"]["w"])
    return jnp.mean((x + params["dense"]["b"] - batch["y"].astype(x.dtype)) ** 2)


@tx.step_fn
def train_step(state, batch):
    cast = state.precision.cast
    loss, grads = tx.value_and_grad(
        lambda p, b: loss_of(cast(p), b).astype(jnp.float32), loss_scale=state.loss_scale
    )(state.params, batch)
    grads, state = state.sync_gradients(grads)
    return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}


def data(seed, overflow=False):
    random = np.random.default_rng(seed)
    x = random.normal(size=(8, 3)).astype(np.float32)
    return {"x": x * (1e30 if overflow else 1), "y": random.normal(size=(8, 2)).astype(np.float32)}


def start():
    random = np.random.default_rng(0)
    w = random.normal(size=(3, 2)).astype(np.float32)
    return {"dense": {"w": w, "b": np.zeros(2, np.float32)}}


def engine_of(optimizer, n=2, **options):
    mesh = tx.MeshSpec(jax.devices()[:n], axes=("data",))
    return tx.Engine(
        mesh=mesh,
        plan=tx.Plan(data_parallel=tx.DP("data")),
        optimizer=optimizer,
        loggers=[],
        **options,
    )


def two_groups():
    return tx.optim.groups(
        {"*/b": tx.optim.sgd(0.1), "*": tx.optim.adamw(tx.optim.cosine(0.05, 20), clip_norm=1.0)}
    )


def test_groups_in_an_engine_equal_optax_and_are_proved():
    engine = engine_of(two_groups())
    state = engine.create_state(start())
    for seed in range(6):
        state, _ = train_step(state, data(seed))
    adamw = optax.adamw(optax.cosine_decay_schedule(0.05, 20), weight_decay=0.01)
    theirs = optax.multi_transform(
        {"b": optax.sgd(0.1), "w": clipped(1.0, adamw)}, {"dense": {"w": "w", "b": "b"}}
    )
    params = start()
    opt_state = theirs.init(params)
    for seed in range(6):
        grads = jax.grad(loss_of)(params, data(seed))
        changes, opt_state = theirs.update(grads, opt_state, params)
        params = optax.apply_updates(params, changes)
    assert_close(state.stored_params, params)
    assert engine.audit(train_step, state, data(0)).status == "proved"


def test_a_float16_overflow_skips_every_group():
    engine = engine_of(two_groups(), precision="float16")
    state = engine.create_state(start())
    state, _ = train_step(state, data(0))
    before = jax.device_get((state.stored_params, state.opt_state))
    state, _ = train_step(state, data(1, overflow=True))
    after = jax.device_get((state.stored_params, state.opt_state))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    state, _ = train_step(state, data(2))
    assert np.any(jax.device_get(state.stored_params["dense"]["w"]) != before[0]["dense"]["w"])


def test_groups_are_saved_and_resumed(tmp_path):
    batches = [data(seed) for seed in range(6)]
    whole = engine_of(two_groups())
    want = whole.fit(train_step, whole.create_state(start()), lambda _: batches, steps=6)
    for steps in (3, 6):
        engine = engine_of(two_groups())
        saved = tx.Checkpoints(tmp_path, every=3)
        state = engine.create_state(start())
        state = engine.fit(train_step, state, lambda _: batches, steps=steps, checkpoints=saved)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get((state.stored_params, state.opt_state)),
        jax.device_get((want.stored_params, want.opt_state)),
    )


REFUSED = {
    "no dict": (
        lambda: tx.optim.groups([tx.optim.sgd(1)]),
        "groups needs a dict of optimizers by path, got list",
    ),
    "none": (lambda: tx.optim.groups({}), "groups needs at least one rule, got {}"),
    "no path": (lambda: tx.optim.groups({0: tx.optim.sgd(1)}), "groups needs paths as rules"),
    "no optimizer": (
        lambda: tx.optim.groups({"*": 0.1}),
        "optimizer needs to be a tx.optim optimizer",
    ),
    "norm": (
        lambda: tx.optim.groups({"*": tx.optim.sgd(1)}, clip_norm=0),
        "groups: clip_norm needs a number above 0, got 0",
    ),
    "unmatched rule": (
        lambda: tx.optim.groups({"dens/*": tx.optim.sgd(1), "*": tx.optim.sgd(1)}).init(tree(0)),
        "groups: the rule 'dens/*' needs a parameter that it matches, but they are "
        f"{str(NAMES)[1:-1]}: write",
    ),
    "hidden rule": (
        lambda: tx.optim.groups({"*": tx.optim.sgd(1), "*/b": tx.optim.sgd(1)}).init(tree(0)),
        "the first rule that matches counts, and 'conv/b' goes to '*' before it: put the narrower",
    ),
    "left out": (
        lambda: tx.optim.groups({"*/w": tx.optim.sgd(1)}).init(tree(0)),
        "groups needs a rule for every parameter, got '*/w', of which none matches 'conv/b', "
        "'scale': end with '*' for the rest",
    ),
    "examples": (
        lambda: tx.optim.groups(
            {"*/b": tx.optim.from_optax(optax.sgd(1), per_example=True), "*": tx.optim.sgd(1)}
        ),
        "groups needs optimizers that all take one gradient for each parameter, or all one for "
        "each example, got '*/b' with one for each example and others without: give all groups "
        "such an optimizer",
    ),
    "gradients": (
        lambda: tx.optim.groups({"*": tx.optim.sgd(1)}).update(
            {"w": jnp.ones(3)}, {"*": {}}, {"w": jnp.ones(2)}, step=jnp.int32(0)
        ),
        "groups needs gradients with the shapes of the parameters, got leaf ['w'] with (3,) "
        "where its parameter has (2,): reduce gradients without changing their shape, and call "
        "init again when the parameters change",
    ),
    "mask of nothing": (
        lambda: tx.optim.sgd(1, decay_mask="*"),
        "sgd: decay_mask needs a weight_decay above 0, got 0.0: pass weight_decay=0.01, or "
        "leave decay_mask out",
    ),
    "mask's rule": (
        lambda: tx.optim.adamw(1, decay_mask=["*/w", "*/kernel"]).init(tree(0)),
        "adamw: the rule '*/kernel' needs a parameter that it matches, but they are 'conv/b'",
    ),
    "mask's structure": (
        lambda: tx.optim.adamw(1, decay_mask={"w": True}).init(tree(0)),
        "adamw: decay_mask needs path rules, or a tree of bools like the parameters, got one of",
    ),
    "mask's leaves": (
        lambda: tx.optim.adamw(1, decay_mask=lambda p: jax.tree.map(jnp.ndim, p)).init(tree(0)),
        "adamw: decay_mask needs Python bools as its leaves, known before the step is compiled",
    ),
}


@pytest.mark.parametrize("make, text", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(make, text):
    with pytest.raises((TypeError, ValueError), match=re.escape(text)):
        make()


# as_optax.

OURS = {
    "sgd": (tx.optim.sgd(0.1, momentum=0.9), optax.sgd(0.1, momentum=0.9)),
    "adamw": (tx.optim.adamw(0.01), optax.adamw(0.01, weight_decay=0.01)),
    "schedule": (
        tx.optim.sgd(tx.optim.cosine(0.1, STEPS)),
        optax.sgd(optax.cosine_decay_schedule(0.1, STEPS)),
    ),
    "groups": GROUPS["three"],
}
AROUND = {
    "alone": lambda inner: inner,
    "chain": lambda inner: optax.chain(optax.clip_by_global_norm(0.5), inner, optax.scale(0.5)),
    "masked": lambda inner: optax.masked(inner, lambda p: jax.tree.map(lambda _: True, p)),
    "multi_transform": lambda inner: optax.multi_transform(
        {"b": inner, "w": optax.adam(0.1), "rest": optax.sgd(1)}, labels(*THREE)
    ),
    "MultiSteps": lambda inner: optax.MultiSteps(inner, 3),
    "apply_if_finite": lambda inner: optax.apply_if_finite(inner, 3),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("name", OURS)
def test_as_optax_stands_in_optax_combinators(name, around):
    ours, theirs = OURS[name]
    if name == "groups" and around is AROUND["multi_transform"]:
        pytest.skip("its rules name parameters that the combinator hides")
    assert_close(
        run_optax(around(ours.as_optax()), tree(0)), run_optax(around(theirs), tree(0)), 1e-4, 1e-5
    )


def test_as_optax_keeps_the_rounding_of_half_precision():
    """Applied by optax, the parameters are those of our own update, bit for bit."""
    ours = tx.optim.adamw(0.01)
    params, grads = tree(0, jnp.bfloat16), tree(1, jnp.bfloat16)
    want, _ = ours.update(grads, ours.init(params), params, step=jnp.int32(0))
    transformation = ours.as_optax()
    changes, state = transformation.update(grads, transformation.init(params), params)
    got = optax.apply_updates(params, changes)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert int(state.step) == 1


def test_as_optax_within_an_engine():
    combined = optax.chain(optax.clip_by_global_norm(0.5), tx.optim.sgd(0.1).as_optax())
    engine = engine_of(combined)
    state, _ = train_step(engine.create_state(start()), data(0))
    direct = engine_of(tx.optim.sgd(0.1, clip_norm=0.5))
    want, _ = train_step(direct.create_state(start()), data(0))
    assert_close(state.stored_params, want.stored_params)


def test_as_optax_refuses_parts():
    transformation = tx.optim.sgd(0.1, clip_norm=1.0).as_optax()
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))

    def part(w):
        return transformation.update({"w": w}, transformation.init({"w": w}), {"w": w})[0]["w"]

    text = (
        "as_optax needs gradients that are whole and equal on every device, got leaf ['w'] "
        "that varies along model: reduce it first (tx.pmean), or give the tx.optim optimizer "
        "itself to the engine, which knows what is split"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        jax.shard_map(part, mesh=mesh, in_specs=P("model"), out_specs=P("model"))(jnp.ones(4))


def test_as_optax_refuses_what_it_cannot_do():
    transformation = tx.optim.sgd(0.1).as_optax()
    with pytest.raises(ValueError, match="as_optax needs the parameters to update, got none: call"):
        transformation.update(tree(1), transformation.init(tree(0)))
    examples = tx.optim.from_optax(optax.sgd(1), per_example=True)
    with pytest.raises(ValueError, match="as_optax needs an optimizer that takes one gradient for"):
        examples.as_optax()


SAID = {
    "sgd(0.1)": tx.optim.sgd(0.1),
    "sgd(<function>, momentum=0.9, nesterov=True)": tx.optim.sgd(
        tx.optim.constant(0.1), momentum=0.9, nesterov=True
    ),
    "adamw(0.001, weight_decay=0.1, decay_mask='*/w', clip_norm=1.0)": tx.optim.adamw(
        0.001, weight_decay=0.1, decay_mask="*/w", clip_norm=1.0
    ),
    "groups({'*/b': sgd(0.1), '*': from_optax(<GradientTransformationExtraArgs>)})": (
        tx.optim.groups({"*/b": tx.optim.sgd(0.1), "*": optax.adam(0.1)})
    ),
}


@pytest.mark.parametrize("text, optimizer", SAID.items())
def test_an_optimizer_says_how_it_was_made(text, optimizer):
    assert repr(optimizer) == text
