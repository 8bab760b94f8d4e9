"""Buckets: their layout by hand, and gradients that are exchanged in them."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore.layout import Layout
from txcore.parallel.gradients import choice
from txcore.parallel.gradients.algorithms import ALGORITHMS
from txcore.parallel.gradients.buckets import bucket_layout

pytestmark = [pytest.mark.usefixtures("unoptimized"), pytest.mark.sampled(2)]

KIB = 1 / 1024
NAMES = [None, *ALGORITHMS]


def shapes(**sizes):
    return {name: jax.ShapeDtypeStruct((n,), "float32") for name, n in sizes.items()}


def laid(tree, layout=None):
    return jax.tree.map(lambda _: layout or Layout(P(), P(), ("data",)), tree)


def test_leaves_in_reverse_order_until_a_bucket_is_full():
    tree = shapes(a=100, b=200, c=56, d=300, e=10, f=20)
    found = bucket_layout(tree, laid(tree), tx.Buckets(mb=1 * KIB, first_mb=0.1 * KIB))
    # 25.6 elements in the first, then 256: f alone, for e does not fit; d is too large for any.
    assert [bucket.names for bucket in found] == [("f",), ("e",), ("d",), ("c", "b"), ("a",)]
    assert [bucket.leaves for bucket in found] == [(5,), (4,), (3,), (2, 1), (0,)]
    assert [bucket.elements for bucket in found] == [(20,), (10,), (300,), (56, 200), (100,)]
    assert str(found).splitlines()[3] == "3: 0.00 MiB, float32 over data: 2 leaves, c ... b"


def test_a_bucket_holds_leaves_that_are_alike():
    tree = {
        "bf16": jax.ShapeDtypeStruct((3,), "bfloat16"),
        "count": jax.ShapeDtypeStruct((3,), "int32"),
        "empty": jax.ShapeDtypeStruct((0, 3), "float32"),
        "f16": jax.ShapeDtypeStruct((3,), "float16"),
        "f32": jax.ShapeDtypeStruct((3, 2), "float32"),
        "part": jax.ShapeDtypeStruct((3,), "float32"),
        "shard": jax.ShapeDtypeStruct((4,), "float32"),
        "still": jax.ShapeDtypeStruct((3,), "float32"),
    }
    how = laid(tree)
    how["part"] = Layout(P("model"), P("model"), ("data",))
    how["shard"] = Layout(P(), P("data"), ("data",))
    how["still"] = Layout(P(), P(), ())
    found = bucket_layout(tree, how, tx.Buckets())
    assert [(b.names, b.dtype, b.scattered, b.split) for b in found] == [
        (("shard",), "float32", ("data",), ()),
        (("part",), "float32", (), ("model",)),
        (("f32", "f16"), "float32", (), ()),
        (("bf16",), "bfloat16", (), ()),
    ]
    assert found[2].nbytes == 4 * 9


def leaves(devices, dtype="float32", seed=0):
    """Gradients of each device, by path; dim 0 is that of devices."""
    rng = np.random.default_rng(seed)
    sizes = {"b": (), "c": (3,), "w": (8, 5), "x": (2, 16)}
    made = {name: rng.normal(size=(devices, *shape)) for name, shape in sizes.items()}
    made["empty"] = np.zeros((devices, 0))
    return {name: np.asarray(jnp.asarray(x, dtype)) for name, x in made.items()}


def sync(grads, axes, layouts=None, out=None, check_vma=True, **options):
    def body(tree):
        local = jax.tree.map(lambda x: x[0], tree)
        return tx.sync_gradients(local, tuple(axes), layouts=layouts, **options)[0]

    return tx.testing.run_sharded(
        body, grads, axes=axes, out_specs=out or P(), check_vma=check_vma, in_specs=P(tuple(axes))
    )


def tolerance(algorithm, dtype="float32"):
    return 2.0**-6 if algorithm == "bf16_wire" or dtype != "float32" else 1e-6


def compare(found, grads, algorithm, dtype="float32"):
    for name, x in grads.items():
        assert found[name].dtype == x.dtype
        wanted = np.float64(x).mean(0)
        np.testing.assert_allclose(
            np.float64(found[name]), wanted, rtol=0, atol=tolerance(algorithm, dtype), err_msg=name
        )


@pytest.mark.parametrize(
    "buckets, check_vma", [(None, True), (0.1 * KIB, True), (0.1 * KIB, False)]
)
@pytest.mark.parametrize("algorithm", NAMES)
def test_the_mean_of_every_leaf(algorithm, buckets, check_vma):
    """Also along an axis of one device, which has to be made equal too."""
    axes = {"node": 2, "one": 1, "device": 2}
    grads = {**leaves(4), "n": np.arange(4)}
    found = sync(grads, axes, buckets=buckets, algorithm=algorithm, check_vma=check_vma)
    compare({k: v for k, v in found.items() if k != "n"}, leaves(4), algorithm)
    assert found["n"] == 1.5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("algorithm", NAMES)
def test_other_dtypes(algorithm, dtype):
    grads = leaves(4, dtype)
    found = sync(grads, {"node": 2, "device": 2}, buckets=0.1 * KIB, algorithm=algorithm)
    compare(found, grads, algorithm, dtype)


SHARDS = {
    "b": Layout(P(), P(), ("node", "device")),
    "c": Layout(P(), P(), ("node", "device")),
    "empty": Layout(P(), P(), ("node", "device")),
    "w": Layout(P(), P(("node", "device")), ("node", "device")),
    "x": Layout(P(), P(None, ("node", "device")), ("node", "device")),
}
WITHIN = {
    name: Layout(P(), P(*(("device",) if e else None for e in one.gradient)), one.reduced)
    for name, one in SHARDS.items()
}


@pytest.mark.parametrize(
    "layouts, buckets", [(SHARDS, 0.25 * KIB), (WITHIN, None)], ids=["over all", "over one axis"]
)
@pytest.mark.parametrize("algorithm", NAMES)
def test_shards_of_the_mean(algorithm, buckets, layouts):
    grads = leaves(4)
    out = {name: layout.gradient for name, layout in layouts.items()}
    axes = {"node": 2, "device": 2}
    found = sync(grads, axes, layouts, out, buckets=buckets, algorithm=algorithm)
    compare(found, grads, algorithm)


def test_by_default_large_leaves_are_not_left_to_one_collective(monkeypatch):
    """On CPU alone, in several processes; the plan predicts what the step does."""
    assert choice.fastest("cpu", 4 << 20, {"data": 2}) == "plain"
    assert choice.fastest("cpu", 32 << 20, {"data": 2}) == "recursive_doubling"
    assert choice.fastest("cpu", 32 << 20, {"data": 3}) == "plain"
    over_processes = [replace(row, over_processes=False) for row in choice.FASTER[:2]]
    monkeypatch.setattr(choice, "FASTER", over_processes)
    params = {"small": np.ones(3, np.float32), "large": np.ones((1 << 20) + 3, np.float32)}
    sent = {}
    for devices in (2, 3):
        mesh = tx.MeshSpec(jax.devices()[:devices], axes=("data",))
        found = tx.Plan(data_parallel=tx.DP("data")).predict(params, mesh)
        sent[devices] = {p.kind: p.elements for p in found}
    assert sent[2] == {"collective-permute": (1 << 20, 3), "all-reduce": (3,)}
    third = ((1 << 20) + 3) // 3
    assert sent[3]["collective-permute"] == (2 * third, 2 * third)
    assert sent[3]["all-reduce"] == (1, 3)
    assert choice.fastest("gpu", 1 << 30, {"data": 8}) == "plain"
    assert choice.fastest("cpu", 1 << 20, {"data": 2}) == "plain"
    grads = {name: np.stack([x, 3 * x]) for name, x in params.items()}
    found = sync(grads, {"data": 2})
    assert all((found[name] == 2).all() for name in params)


def test_by_default_many_leaves_are_packed_on_cpu():
    """Of what has few leaves, XLA makes one all-reduce without a copy."""
    for count, kept in ((15, 0), (16, 16)):
        params = {f"p{i:02}": np.ones(3, np.float32) for i in range(count)}
        mesh = tx.MeshSpec(jax.devices()[:2], axes=("data",))
        layout = tx.Plan(data_parallel=tx.DP("data")).bucket_layout(params, mesh)
        assert sum(len(bucket.leaves) for bucket in layout) == kept
        plain = tx.Plan(data_parallel=tx.DP("data", algorithm="plain"))
        assert plain.bucket_layout(params, mesh) == ()


def test_a_gradient_that_is_reduced_already_is_refused():
    def body(g):
        return tx.sync_gradients({"w": tx.pmean(g, "data")}, "data", algorithm="ring")[0]

    text = r"tx.sync_gradients over axis 'data': grads['w'] does not vary along it"
    with pytest.raises(ValueError, match=re.escape(text)):
        tx.testing.run_sharded(body, np.ones(4, np.float32), axes={"data": 4})


@pytest.mark.parametrize(
    "options, text",
    [
        ({"algorithm": "tree"}, "DP needs algorithm= 'plain', 'chunked', "),
        ({"algorithm": "hierarchical"}, "DP needs two axes or more with algorithm='hierarchical'"),
        ({"buckets": 0}, "DP needs buckets= a number of MiB above 0, got 0"),
        ({"buckets": "25"}, "DP needs buckets= a number of MiB, tx.Buckets(mb=...) or None"),
        (
            {"buckets": 25, "shard": "parameters"},
            "DP needs buckets=None with shard='parameters', got 25: there the layers are",
        ),
        (
            {"algorithm": "plain", "compression": "int8"},
            "DP needs algorithm=None with compression='int8', got 'plain': a compression has an",
        ),
        ({"algorithm": "ring", "reduction": "adasum"}, "DP needs algorithm=None with reduction="),
        ({"buckets": 1, "sync_every": 4}, "DP needs buckets=None with sync_every=4, got 1"),
        ({"buckets": True}, "DP needs buckets= a number of MiB, tx.Buckets(mb=...) or None"),
    ],
)
def test_what_dp_refuses(options, text):
    with pytest.raises((ValueError, TypeError), match=re.escape(text)):
        tx.DP("data", **options)


@pytest.mark.parametrize("size", [0, -1.0, "1", True, None, float("nan")])
def test_a_size_that_is_none(size):
    with pytest.raises(ValueError, match="Buckets needs first_mb= a number of MiB above 0"):
        tx.Buckets(first_mb=size)


def test_recursive_doubling_over_three_devices_is_refused():
    text = (
        "algorithm='recursive_doubling' needs a number of devices that is a power of two, got the "
        "axes 'data' of 3: write algorithm='chunked'"
    )
    plan = tx.Plan(data_parallel=tx.DP("data", algorithm="recursive_doubling"))
    mesh = tx.MeshSpec(jax.devices()[:3], axes=("data",))
    with pytest.raises(ValueError, match=re.escape(text)):
        plan.predict({"w": np.zeros(3)}, mesh)
    with pytest.raises(ValueError, match=re.escape(text)):
        sync({"w": np.ones((3, 2), np.float32)}, {"data": 3}, algorithm="recursive_doubling")
