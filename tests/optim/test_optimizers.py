"""tx.optim against optax and float64 NumPy, over several steps."""

import dataclasses

import jax
import jax.numpy as jnp
import machine
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import txcore as tx

pytestmark = [pytest.mark.usefixtures("unoptimized"), pytest.mark.sampled(2)]

STEPS = 20


def tree(seed, dtype=jnp.float32):
    random = np.random.default_rng(seed)
    shapes = {"conv": {"w": (3, 3, 2, 4), "b": (4,)}, "scale": ()}
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def run(optimizer, params, steps=STEPS, grad_dtype=jnp.float32):
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        params, state = update(tree(step + 1, grad_dtype), state, params, step=jnp.int32(step))
    return params, state


def run_optax(transformation, params):
    state = transformation.init(params)
    update = jax.jit(transformation.update)
    for step in range(STEPS):
        changes, state = update(tree(step + 1), state, params)
        params = optax.apply_updates(params, changes)
    return params


def assert_trees_close(got, want, rtol=2e-5, atol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


optax_cosine = optax.cosine_decay_schedule(0.1, STEPS)
PAIRS = {
    "sgd": (tx.optim.sgd(0.1), optax.sgd(0.1)),
    "momentum": (tx.optim.sgd(0.1, momentum=0.9), optax.sgd(0.1, momentum=0.9)),
    "nesterov": (
        tx.optim.sgd(0.1, momentum=0.9, nesterov=True),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
    ),
    "sgd with everything": (
        tx.optim.sgd(
            tx.optim.cosine(0.1, STEPS), momentum=0.9, nesterov=True, weight_decay=0.05, clip_norm=1
        ),
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.add_decayed_weights(0.05),
            optax.sgd(optax_cosine, momentum=0.9, nesterov=True),
        ),
    ),
    "plain sgd with decay and clip": (
        tx.optim.sgd(0.1, weight_decay=0.05, clip_norm=2.0),
        optax.chain(
            optax.clip_by_global_norm(2.0), optax.add_decayed_weights(0.05), optax.sgd(0.1)
        ),
    ),
    "adamw": (tx.optim.adamw(0.01), optax.adamw(0.01, weight_decay=0.01)),
    "adamw with everything": (
        tx.optim.adamw(
            tx.optim.cosine(0.1, STEPS), b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.1, clip_norm=0.5
        ),
        optax.chain(
            optax.clip_by_global_norm(0.5),
            optax.adamw(optax_cosine, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.1),
        ),
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_equals_optax(pair):
    ours, theirs = PAIRS[pair]
    got, _ = run(ours, tree(0))
    assert_trees_close(got, run_optax(theirs, tree(0)))


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_equals_float64_numpy(nesterov):
    got, state = run(tx.optim.sgd(0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01), tree(0))
    p = np.asarray(tree(0)["conv"]["w"], np.float64)
    v = np.zeros_like(p)
    for step in range(STEPS):
        d = np.asarray(tree(step + 1)["conv"]["w"], np.float64) + 0.01 * p
        v = 0.9 * v + d
        p = p - 0.1 * (d + 0.9 * v if nesterov else v)
    np.testing.assert_allclose(got["conv"]["w"], p, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state["velocity"]["conv"]["w"], v, rtol=1e-5, atol=1e-5)


def test_adamw_equals_float64_numpy():
    got, _ = run(tx.optim.adamw(0.01, weight_decay=0.1), tree(0))
    p = np.asarray(tree(0)["conv"]["w"], np.float64)
    m, v = np.zeros_like(p), np.zeros_like(p)
    for step in range(STEPS):
        g = np.asarray(tree(step + 1)["conv"]["w"], np.float64)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        mean, root = m / (1 - 0.9 ** (step + 1)), np.sqrt(v / (1 - 0.999 ** (step + 1)))
        p = p - 0.01 * (mean / (root + 1e-8) + 0.1 * p)
    np.testing.assert_allclose(got["conv"]["w"], p, rtol=3e-6, atol=3e-6)


OPTIMIZERS = {
    "sgd": tx.optim.sgd(0.1),
    "momentum": tx.optim.sgd(tx.optim.constant(0.1), momentum=0.9, clip_norm=1.0),
    "adamw": tx.optim.adamw(tx.optim.warmup(0.1, 3), clip_norm=1.0),
    "optax": tx.optim.from_optax(optax.adam(0.1)),
    "optax with weak state": tx.optim.from_optax(optax.inject_hyperparams(optax.sgd)(0.1)),
}
PARAMS = {
    "tree": tree(0),
    "bfloat16": tree(0, jnp.bfloat16),
    "mixed": {"a": jnp.ones(3), "b": jnp.ones((), jnp.bfloat16), "c": [jnp.ones((2, 0))]},
    "scalar": jnp.float32(2.0),
    "weak": jnp.asarray(2.0),
    "empty": {},
    "nested empty": {"a": (), "b": [None]},
}


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_keeps_its_structure_shapes_and_dtypes(optimizer, params):
    optimizer, params = OPTIMIZERS[optimizer], PARAMS[params]
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    grads = jax.tree.map(lambda p: jnp.ones_like(p, jnp.float16), params)
    new_params, new_state = update(grads, state, params, step=jnp.int32(0))
    assert jax.tree.structure((new_params, new_state)) == jax.tree.structure((params, state))
    for new, old in zip(jax.tree.leaves(new_state), jax.tree.leaves(state), strict=True):
        assert isinstance(old, jax.Array)
        assert (new.shape, new.dtype, new.weak_type) == (old.shape, old.dtype, False)
        assert not old.weak_type
    for new, old in zip(jax.tree.leaves(new_params), jax.tree.leaves(params), strict=True):
        assert (new.shape, new.dtype, new.weak_type) == (old.shape, old.dtype, False)
        assert (np.asarray(new) < np.asarray(old)).all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_many_steps_compile_once(optimizer):
    optimizer, params = OPTIMIZERS[optimizer], tree(0)
    traces = []

    @jax.jit
    def update(grads, state, params, step):
        traces.append(step)
        return optimizer.update(grads, state, params, step=step)

    state = optimizer.init(params)
    for step in range(4):
        params, state = update(tree(step), state, params, jnp.int32(step))
    assert len(traces) == 1


def test_moments_of_bfloat16_parameters_are_float32():
    state = tx.optim.adamw(0.1).init(tree(0, jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}


def test_the_moments_are_separate_buffers():
    params = tree(0)
    optimizer = tx.optim.adamw(0.1)
    step = jax.jit(lambda s, p: optimizer.update(p, s, p, step=jnp.int32(0)), donate_argnums=(0, 1))
    step(optimizer.init(params), params)


def test_gradients_of_another_dtype_are_cast():
    optimizer = tx.optim.sgd(0.5, momentum=0.5)
    got, state = run(optimizer, tree(0), steps=3, grad_dtype=jnp.bfloat16)
    p = np.asarray(tree(0)["scale"], np.float64)
    v = 0.0
    for step in range(3):
        v = 0.5 * v + float(tree(step + 1, jnp.bfloat16)["scale"])
        p = p - 0.5 * v
    np.testing.assert_allclose(got["scale"], p, rtol=1e-6)
    assert state["velocity"]["scale"].dtype == got["scale"].dtype == jnp.float32


SCALED = {
    "sgd": tx.optim.sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "clipped sgd": tx.optim.sgd(0.1, momentum=0.9, clip_norm=1.0),
    "sgd clipped by more than there is": tx.optim.sgd(0.1, clip_norm=100.0),
    "clipped adamw": tx.optim.adamw(0.1, clip_norm=1.0),
    "optax": tx.optim.from_optax(optax.adam(0.1)),
    "clipped optax": tx.optim.from_optax(optax.chain(optax.clip_by_global_norm(1.0))),
}


@pytest.mark.parametrize("optimizer", SCALED)
def test_grad_scale_multiplies_before_clipping_and_all_else(optimizer):
    optimizer, params = SCALED[optimizer], tree(0)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    want = update(tree(1), state, params, step=jnp.int32(0))
    for scale in (2.0**-10, -(2.0**-10)):
        scaled = jax.tree.map(lambda g, scale=scale: g / scale, tree(1))  # exact
        got = update(scaled, state, params, step=jnp.int32(0), grad_scale=scale)
        assert_trees_close(got, want, rtol=1e-6, atol=1e-7)


def test_half_precision_gradients_are_unscaled_in_float32():
    small = jnp.full(3, 2.0**-20, jnp.float16)  # times 2**-20 it is below float16's least
    for optimizer in (tx.optim.sgd(1.0), tx.optim.from_optax(optax.sgd(1.0))):
        params = jnp.zeros(3)
        step = {"step": jnp.int32(0), "grad_scale": 2.0**-20}
        got, _ = optimizer.update(small, optimizer.init(params), params, **step)
        np.testing.assert_array_equal(got, np.full(3, -(2.0**-40)))


@pytest.mark.parametrize("make", [tx.optim.sgd, tx.optim.adamw])
def test_clipping_in_the_update_equals_clipping_apart(make):
    params, grads = tree(0), tree(1)
    fused, plain = make(0.1, clip_norm=0.5), make(0.1)
    clipped = tx.optim.clip_by_global_norm(grads, 0.5)
    got = jax.jit(fused.update)(grads, fused.init(params), params, step=jnp.int32(0))
    want = jax.jit(plain.update)(clipped, plain.init(params), params, step=jnp.int32(0))
    assert_trees_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("make", [tx.optim.sgd, tx.optim.adamw])
def test_a_clipped_update_after_a_gradient_that_is_not_finite_is_nan(make):
    optimizer, params = make(0.1, clip_norm=0.5), [jnp.ones(2), jnp.ones(3)]
    grads = [jnp.array([1.0, jnp.inf]), jnp.ones(3)]
    got, _ = optimizer.update(grads, optimizer.init(params), params, step=jnp.int32(0))
    assert all(np.isnan(leaf).all() for leaf in got)


@machine.cpu_only("XLA allocates other buffers elsewhere")
@pytest.mark.parametrize("make", [tx.optim.adamw, lambda **k: tx.optim.sgd(momentum=0.9, **k)])
def test_clipping_keeps_no_copy_of_the_gradients(make):
    params = jnp.ones(1 << 16)
    optimizer = make(learning_rate=0.1, clip_norm=1.0)

    def update(params, state, grads):  # jax gives the donated to the results in their order
        return optimizer.update(grads, state, params, step=jnp.int32(0))

    options = tx.kernels.compiler_options("cpu")
    compiled = jax.jit(update, donate_argnums=(0, 1), compiler_options=options)
    memory = compiled.lower(params, optimizer.init(params), params).compile().memory_analysis()
    assert memory.temp_size_in_bytes < params.nbytes // 8


def test_an_update_of_a_users_own_may_do_without_grad_scale():
    def update(grads, opt_state, params, *, step):
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), opt_state

    engine = tx.Engine(
        mesh=tx.MeshSpec(devices=jax.devices()[:1], axes=("data",)),
        plan=tx.Plan(data_parallel=tx.DP(axis="data")),
        optimizer=tx.optim.Optimizer(lambda params: {}, update),
    )

    @tx.step_fn
    def train_step(state, batch):
        grads = tx.value_and_grad(lambda p, b: (p * b).mean())(state.params, batch)[1]
        return state.apply_gradients(grads=grads), {}

    state, _ = train_step(engine.create_state(jnp.float32(1.0)), np.ones(4, np.float32))
    assert float(state.stored_params) == 0.5


def test_plain_sgd_keeps_no_state():
    assert tx.optim.sgd(0.1).init(tree(0)) == {}


def test_a_schedule_sees_the_number_of_completed_updates():
    optimizer = tx.optim.sgd(lambda step: jnp.where(step == 0, 1.0, 0.0))
    got, _ = run(optimizer, tree(0), steps=2)
    np.testing.assert_allclose(got["scale"], tree(0)["scale"] - tree(1)["scale"], rtol=1e-6)


def test_an_optimizer_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(tx.optim.sgd(0.1), "init", None)  # noqa: B010


@pytest.fixture(scope="module")
def mesh():
    return machine.mesh(data=2)


class TestInsideShardMap:
    @pytest.mark.parametrize("checked", [True, False])
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_whole_leaves_stay_invariant(self, name, checked, mesh):
        optimizer, params, grads = OPTIMIZERS[name], tree(0), tree(1)
        state = optimizer.init(params)
        mapped = jax.shard_map(
            lambda g, s, p: optimizer.update(g, s, p, step=jnp.int32(0)),
            mesh=mesh,
            in_specs=P(),
            out_specs=P(),
            check_vma=checked,
        )
        want = optimizer.update(grads, state, params, step=jnp.int32(0))
        assert_trees_close(jax.jit(mapped)(grads, state, params), want, atol=1e-5)

    @pytest.mark.parametrize(
        "make", [tx.optim.adamw, lambda rate: tx.optim.sgd(rate, momentum=0.9)]
    )
    def test_shards_get_moments_that_are_shards(self, make, mesh):
        optimizer, params = make(0.1), jnp.arange(4.0)

        def on_device(p):
            def body(carry, step):
                p, state = carry
                return optimizer.update(p + 1, state, p, step=step), None

            return lax.scan(body, (p, optimizer.init(p)), jnp.arange(3))[0]

        mapped = jax.shard_map(on_device, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
        assert_trees_close(jax.jit(mapped)(params), on_device(params))

    @pytest.mark.parametrize(
        "optimizer, who, remedy",
        [
            (tx.optim.sgd(0.1, clip_norm=1.0), "sgd: clip_norm", "leave clip_norm out"),
            (tx.optim.adamw(0.1, clip_norm=1.0), "adamw: clip_norm", "leave clip_norm out"),
            (tx.optim.from_optax(optax.sgd(0.1)), "from_optax", "elementwise=True"),
        ],
    )
    def test_what_needs_whole_gradients_refuses_parts(self, optimizer, who, remedy, mesh):
        params = {"w": jnp.arange(4.0)}

        def on_device(p):
            return optimizer.update(p, optimizer.init(p), p, step=jnp.int32(0))[0]

        text = (
            rf"{who} needs gradients that are whole and equal on every device, got leaf \['w'\] "
            rf"that varies along data: reduce it first \(tx.pmean\), or .*{remedy}"
        )
        mapped = jax.shard_map(on_device, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
        with pytest.raises(ValueError, match=text):
            jax.jit(mapped)(params)

    def test_an_elementwise_optax_transformation_takes_parts(self, mesh):
        optimizer = tx.optim.from_optax(optax.sgd(0.5), elementwise=True)

        def on_device(p):
            return optimizer.update(p, optimizer.init(p), p, step=jnp.int32(0))[0]

        mapped = jax.shard_map(on_device, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
        np.testing.assert_array_equal(jax.jit(mapped)(jnp.arange(4.0)), jnp.arange(4.0) / 2)
