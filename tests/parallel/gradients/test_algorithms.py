"""Every algorithm: values against float64 NumPy, types, derivatives, and what it sends."""

import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore.parallel.gradients.algorithms import (
    ALGORITHMS,
    is_power_of_two,
    mean_blocks,
    mean_flat,
    pieces,
)
from txcore.profiling import audit

pytestmark = [pytest.mark.usefixtures("unoptimized"), pytest.mark.sampled(2)]

MESHES = [{"data": 3}, {"data": 4}, {"node": 2, "device": 4}]
NAMES = list(ALGORITHMS)


def meshes_of(name):
    return [m for m in MESHES if fits(name, math.prod(m.values()))]


def fits(name, devices):
    return name != "recursive_doubling" or is_power_of_two(devices)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(pieces, "CHUNK_BYTES", 64)


def data(sizes, n, dtype, seed=0):
    """One array of n elements for each device."""
    rng = np.random.default_rng(seed)
    return np.asarray(jnp.asarray(rng.normal(size=(math.prod(sizes.values()), n)), dtype))


def tolerance(name, dtype):
    if name == "bf16_wire" or dtype == "bfloat16":
        return 2.0**-6
    return {"float16": 2.0**-9, "float32": 1e-6, "float64": 1e-14}[dtype]


def assert_near(found, x, name, dtype):
    """Compare with the mean of `x`, whose numbers are about 1, over its first dim."""
    assert found.dtype == jnp.dtype(dtype)
    wanted = np.float64(x).mean(0)
    np.testing.assert_allclose(np.float64(found), wanted, rtol=0, atol=tolerance(name, dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_mean_on_any_mesh(name, dtype):
    """Of every length, and of each device's own block."""
    with jax.enable_x64(dtype == "float64"):
        meshes = meshes_of(name) if dtype == "float32" else MESHES[-1:]
        for sizes, check_vma in [(m, True) for m in meshes] + [(MESHES[-1], False)]:
            axes, devices = tuple(sizes), math.prod(sizes.values())
            few, many, blocks = (data(sizes, n, dtype) for n in (1, 53, devices * 7))
            blocks = blocks.reshape(devices, devices, 7)

            def average(few, many, blocks, axes=axes):
                algorithm = ALGORITHMS[name]
                flat = [mean_flat(algorithm, v[0], axes, w) for v, w in ((few, "a"), (many, "b"))]
                return *flat, mean_blocks(algorithm, blocks[0], axes, "c")

            found = tx.testing.run_sharded(
                average,
                *(few, many, blocks),
                axes=sizes,
                out_specs=(P(), P(), P(axes)),
                check_vma=check_vma,
            )
            for result, x in zip(found, (few, many, blocks), strict=True):
                assert_near(result.reshape(x.shape[1:]), x, name, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_beyond_float16_in_the_sum_alone(name):
    x = np.full((8, 5), 60000, np.float16)
    found = tx.testing.run_sharded(
        lambda v: mean_flat(ALGORITHMS[name], v[0], ("data",), "g"), x, axes={"data": 8},
        in_specs=P("data"), out_specs=P(),
    )  # fmt: skip
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.float64(found), 60000, rtol=2.0**-8)


@pytest.mark.parametrize("name", NAMES)
def test_axes_in_another_order_than_the_mesh_has(name):
    """Blocks are counted in the order that is given."""
    x = data({"data": 8}, 8 * 3, "float32").reshape(2, 4, 8, 3)
    found = tx.testing.run_sharded(
        lambda v: mean_blocks(ALGORITHMS[name], v[0, 0], ("device", "node"), "g"), x,
        axes={"node": 2, "device": 4},
        in_specs=P("node", "device"), out_specs=P(("device", "node")),
    )  # fmt: skip
    assert_near(found.reshape(8, 3), x.reshape(8, 8, 3), name, "float32")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [{"data": 4}, {"node": 2, "device": 2}], ids=["1 axis", "2 axes"])
def test_derivatives_are_those_of_the_mean(name, sizes):
    axes = tuple(sizes)
    x, t = data(sizes, 10, "float32"), data(sizes, 10, "float32", seed=1)
    weights = np.arange(1.0, 11, dtype=np.float32)

    def f(v):
        return mean_flat(ALGORITHMS[name], v, axes, "g")

    def run(body, *args, out):
        return tx.testing.run_sharded(body, *args, axes=sizes, in_specs=P(axes), out_specs=out)

    _, tangent = run(lambda v, u: jax.jvp(f, (v[0],), (u[0],)), x, t, out=P())
    np.testing.assert_allclose(tangent, np.float64(t).mean(0), atol=1e-6)
    # Each device's gradient of the one loss that all devices compute.
    grad = run(lambda v: jax.grad(lambda u: jnp.sum(weights * f(u)))(v[0])[None], x, out=P(axes))
    np.testing.assert_allclose(grad, np.broadcast_to(weights / 4, (4, 10)), rtol=1e-6)
    again = run(
        lambda v: jax.grad(jax.remat(lambda u: jnp.sum(weights * f(u))))(v[0])[None],
        *(x,),
        out=P(axes),
    )
    np.testing.assert_array_equal(again, grad)


@pytest.mark.parametrize("name", NAMES)
def test_the_shards_derivatives_are_those_of_a_reduce_scatter(name):
    x = data({"data": 4}, 12, "float32").reshape(4, 4, 3)
    weights = data({"data": 4}, 3, "float32", seed=1)

    def loss(v, w):
        return jnp.sum(w * mean_blocks(ALGORITHMS[name], v, ("data",), "g"))

    grad = tx.testing.run_sharded(
        lambda v, w: jax.grad(loss)(v[0], w[0])[None], x, weights, axes={"data": 4}
    )
    np.testing.assert_allclose(grad, np.broadcast_to(weights / 4, (4, 4, 3)), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_under_vmap_and_scan(name):
    x = data({"data": 4}, 3 * 10, "float32").reshape(4, 3, 10)

    def f(v):
        return mean_flat(ALGORITHMS[name], v, ("data",), "g")

    for transformed in (jax.vmap(f), lambda v: jax.lax.map(f, v)):
        found = tx.testing.run_sharded(
            lambda v, g=transformed: g(v[0]), x, axes={"data": 4}, out_specs=P()
        )
        assert_near(found, x, name, "float32")


@pytest.mark.parametrize("name", NAMES)
def test_an_axis_of_a_model_stays_apart(name):
    x = data({"data": 8}, 9, "float32").reshape(2, 4, 9)
    found = tx.testing.run_sharded(
        lambda v: mean_flat(ALGORITHMS[name], v[0, 0], ("data",), "g")[None], x,
        axes={"model": 2, "data": 4}, in_specs=P("model", "data"), out_specs=P("model"),
    )  # fmt: skip
    assert_near(found, x.swapaxes(0, 1), name, "float32")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_sent_of_nothing(name):
    x = np.zeros((4, 0), np.float32)
    found = tx.testing.run_sharded(
        lambda v: mean_flat(ALGORITHMS[name], v[0], ("data",), "g"), x, axes={"data": 4},
        in_specs=P("data"), out_specs=P(),
    )  # fmt: skip
    assert found.shape == (0,)


PERMUTE = "collective-permute"


def sent(report):
    """The bytes by kind, dtype and axes.

    A permute over several axes whose partners lie along one of them goes over that one: what is
    sent by permutes is counted over all axes that they take together.
    """
    found = Counter()
    permuted = frozenset(
        axis for row in report.collectives if row.kind == PERMUTE for axis in row.axes
    )
    for row in report.collectives:
        axes = permuted if row.kind == PERMUTE else frozenset(row.axes)
        found[row.kind, row.dtype, axes] += row.payload_bytes * row.trips
    return found


def predicted(lines):
    found = Counter()
    for line in lines:
        found[line.kind, line.dtype, frozenset(line.axes)] += line.payload_bytes
    return found


@pytest.mark.parametrize("name, sizes", [(n, m) for n in NAMES for m in meshes_of(n)])
def test_what_is_sent_is_what_the_record_says(name, sizes):
    dtype = "bfloat16" if sizes == {"data": 4} else "float32"
    axes, devices = tuple(sizes), math.prod(sizes.values())
    algorithm = ALGORITHMS[name]
    mesh = Mesh(
        np.array(jax.devices()[:devices]).reshape(tuple(sizes.values())), axes,
        axis_types=(AxisType.Auto,) * len(axes),
    )  # fmt: skip

    def audited(body, shape, out):
        x = jax.ShapeDtypeStruct((devices, *shape), dtype)
        mapped = jax.shard_map(body, mesh=mesh, in_specs=P(axes), out_specs=out)
        report = audit(mapped, x)
        assert report.exact, report
        assert {r.origin for r in report.collectives} == {"txcore"}
        return report

    report = audited(lambda v: mean_flat(algorithm, v[0], axes, "g"), (53,), P())
    assert sent(report) == predicted(algorithm.sends_flat(53, dtype, sizes))
    report = audited(lambda v: mean_blocks(algorithm, v[0], axes, "g"), (devices, 7), P(axes))
    assert sent(report) == predicted(algorithm.sends_blocks(devices * 7, dtype, sizes))
