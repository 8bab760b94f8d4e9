"""An optimizer that needs whole matrices, of which each device stores parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore.optim.muon import deal_out, orthogonalize_leaves

# Five of one shape, for four devices: dealt out in two rounds; one by itself; one of a stack.
SHAPES = {**{f"h{i}": (8, 8) for i in range(5)}, "out": (8, 4), "stack": (2, 8, 8)}


def params():
    matrices = {
        name: np.random.default_rng(i).normal(size=shape).astype(np.float32) / 3
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    return {**matrices, "b": np.zeros(4, np.float32)}


def batch(seed):
    x = np.random.default_rng(seed).normal(size=(16, 8)).astype(np.float32)
    return {"x": x, "y": x[:, :4]}


def loss_of(p, b):
    x = b["x"]
    for name in SHAPES:
        if name != "out":
            for w in p[name].reshape(-1, 8, 8):
                x = x + jnp.tanh(x @ w)
    return tx.example_mean(jnp.sum((x @ p["out"] + p["b"] - b["y"]) ** 2, -1), axis="data")


@tx.step_fn
def train_step(state, b):
    loss, grads = tx.value_and_grad(loss_of)(state.params, b)
    grads, state = state.sync_gradients(grads)
    return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data", name="loss")}


def engine(n, shard=None, rules=None, model=1):
    return tx.Engine(
        mesh=tx.MeshSpec(jax.devices()[: n * model], ("data", "model"), (n, model)),
        plan=tx.Plan(data_parallel=tx.DP("data", shard=shard), params=rules or {}),
        optimizer=tx.optim.groups(
            {"b": tx.optim.adamw(0.01), "*": tx.optim.muon(0.02, weight_decay=0.01)},
            clip_norm=1.0,
        ),
    )


def run(made, steps=3):
    state, losses = made.create_state(params()), []
    for seed in range(steps):
        state, metrics = train_step(state, batch(seed))
        losses.append(float(metrics["loss"]))
    return jax.tree.map(np.asarray, state.stored_params), losses


@pytest.mark.parametrize("n, shard", [(2, "optimizer"), (4, "optimizer"), (4, "parameters")])
def test_the_same_run_as_on_one_device(n, shard):
    ours, one = run(engine(n, shard)), run(engine(1))
    np.testing.assert_allclose(ours[1], one[1], rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours[0], one[0]
    )


def test_the_audit_is_exact_and_as_predicted():
    made = engine(4, "optimizer")
    report = made.audit(train_step, made.create_state(params()), batch(0))
    assert report.exact, report
    lines = [(n.kind, n.payload_bytes, n.found_bytes) for n in report.plan if n.what == "optimizer"]
    # Five matrices of 8 x 8 padded to eight, of which a device has a quarter each; there and back.
    dealt = 2 * 4 * 8 * 16 + 2 * 4 * (8 * 4)
    gathered = 4 * (2 * 8 * 8)
    assert sorted(lines) == [("all-gather", gathered, gathered), ("all-to-all", dealt, dealt)]
    assert {n.what for n in report.plan if not n.payload_bytes} == {"pmean/loss"}


def test_the_devices_share_the_cost_of_all_shapes():
    """Of matrices that the devices share unevenly, whoever has least to do gets the next."""
    sizes = {"data": 4}
    large, middle, small = (64, 256), (32, 128), (16, 64)  # a part's; the cost falls to an eighth
    shapes = [small, large, middle, large, middle, small, large, small, small, small]
    deals = deal_out(shapes, [P("data")] * len(shapes), sizes)
    owners = {shapes[deal.places[0]]: deal.owners for deal in deals}
    assert owners == {large: (0, 1, 2), middle: (3, 0), small: (3,)}
    assert all(deal.by_owner for deal in deals)
    (alone,) = deal_out([large], [P("data")], sizes)
    assert not alone.by_owner


@pytest.mark.parametrize("dim", [0, 1])
def test_whoever_owns_a_matrix_it_is_that_of_numpy(dim):
    """Seven matrices of three shapes by four devices, against the iteration in float64."""
    rng = np.random.default_rng(0)
    whole = [rng.normal(size=s) for s in [(8, 16)] * 5 + [(4, 4), (16, 8)]]
    spec = P(*[None] * dim, "data")

    def truth(x):
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        x = x / np.linalg.norm(x)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
        return x.T if tall else x

    found = tx.testing.run_sharded(
        lambda *parts: tuple(orthogonalize_leaves(parts, [spec] * 7, 5)),
        *(np.float32(x) for x in whole),
        axes={"data": 4},
        in_specs=(spec,) * 7,
        out_specs=(spec,) * 7,
    )
    for ours, x in zip(found, whole, strict=True):
        np.testing.assert_allclose(ours, truth(x), rtol=2e-3, atol=1e-4)


def test_one_device_orthogonalizes_a_share_of_the_matrices():
    """The update of four matrices by four devices has the products of one matrix, not of four."""

    def flops(specs, **options):
        def update(parts):
            return orthogonalize_leaves(parts, specs, 5)

        mapped = jax.shard_map(update, in_specs=(specs,), out_specs=specs, **options)
        cost = jax.jit(mapped).lower(PARTS).compile().cost_analysis()
        assert cost is not None
        return cost["flops"]

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    assert flops([P("data")] * 4, mesh=mesh) < 0.3 * flops([P()] * 4, mesh=mesh)


PARTS = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 4


def test_parts_over_two_axes_are_gathered():
    rules = {"h*": P("model", None)}
    made = engine(2, "optimizer", rules, model=2)
    layouts = made.plan.layouts(params(), made.mesh)
    assert layouts["h0"].gradient == P("model", "data")

    @tx.step_fn
    def step(state, b):
        grads = jax.tree.map(lambda p: p * 0 + jnp.sin(p), state.stored_params)
        data = tx.vary(grads, "data", name="given")
        grads, state = state.sync_gradients(data)
        return state.apply_gradients(grads=grads), {}

    one = engine(1)
    ours, _ = step(made.create_state(params()), batch(0))
    alone, _ = step(one.create_state(params()), batch(0))
    for name in ("h0", "h4", "out"):
        np.testing.assert_allclose(
            np.asarray(ours.stored_params[name]), alone.stored_params[name], rtol=1e-3, atol=1e-4
        )
