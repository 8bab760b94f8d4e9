"""Compressed gradients against float64 NumPy, and what is left over."""

import re

import compression_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore.layout import Layout
from txcore.parallel.gradients.compression.powersgd import orthonormalize

pytestmark = pytest.mark.sampled(2)
FEEDBACK = {
    "int8": tx.compression.int8(),
    "powersgd": tx.compression.powersgd(2),
    "started later": tx.compression.powersgd(2, start=3),
    "top-k": tx.compression.top_k(0.05),
}


def truth_of(name, run):
    if name == "powersgd":
        own = run.state["compression"]["own"]
        return cases.LowRank(2, {k: np.float64(q[0]) for k, q in own.items() if q is not None})
    return {
        "bf16": lambda: cases.Quantized(cases.through_bf16, feedback=False),
        "fp16": lambda: cases.Quantized(cases.through_fp16, feedback=False),
        "int8": lambda: cases.Quantized(cases.through_int8, feedback=True),
        "top-k": lambda: cases.TopK(0.05),
    }[name]()


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("name", ["bf16", "fp16", "int8", "powersgd", "top-k"])
def test_values_are_those_of_numpy(name, devices):
    run = cases.Run(FEEDBACK.get(name, name), {"data": devices})
    truth = truth_of(name, run)
    for seed in range(3):
        grads = cases.gradients(devices, seed)
        means = run.step(grads)
        found = np.concatenate([means[k].reshape(-1) for k in sorted(means)])
        wanted = truth.step(grads)
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-5 * np.abs(wanted).max())
        assert {k: (m.shape, m.dtype) for k, m in means.items()} == {
            k: (g.shape[1:], g.dtype) for k, g in grads.items()
        }


@pytest.mark.parametrize("name, bits", [("bf16", 8), ("fp16", 11)])
def test_two_roundings_are_all_that_is_lost(name, bits):
    run, grads = cases.Run(name, {"data": 4}), cases.gradients(4)
    means, exact = run.step(grads), cases.exact(grads)
    for key, mean in means.items():
        scale = np.abs(grads[key]).max()
        np.testing.assert_allclose(mean, exact[key], atol=2 * 2.0**-bits * scale)


def layouts_of(**split):
    """Return layouts of which some leaves are split over "data"."""
    return {k: Layout(P(), split.get(k, P()), ("node", "data")) for k in cases.SHAPES}


SPLIT = layouts_of(w=P(None, "data"), conv=P(None, None, "data"))


@pytest.mark.parametrize(
    "name, layouts, check_vma",
    [(name, layouts, True) for name in FEEDBACK for layouts in (None, SPLIT)]
    + [("int8", SPLIT, False), ("started later", None, False)],
)
def test_what_the_means_lack_is_kept(name, layouts, check_vma):
    """The sum of the means is that of the exact ones, but for what is pending, which is bounded."""
    run = cases.Run(FEEDBACK[name], {"node": 2, "data": 2}, layouts=layouts, check_vma=check_vma)
    exact = {k: np.zeros(shape) for k, shape in cases.SHAPES.items()}
    found = {k: np.zeros(shape) for k, shape in cases.SHAPES.items()}
    common = cases.gradients(1, seed=99)
    missing = []
    for seed in range(30):
        noise = cases.gradients(4, seed)
        grads = {k: common[k] + noise[k] for k in noise}
        means = run.step(grads)
        exact = {k: exact[k] + g for k, g in cases.exact(grads).items()}
        found = {k: found[k] + np.float64(m) for k, m in means.items()}
        missing.append(np.linalg.norm(exact["w"] - found["w"]) / np.linalg.norm(exact["w"]))
    for k, pending in run.pending.items():
        scale = np.abs(exact[k]).max()
        np.testing.assert_allclose(found[k] + pending, exact[k], atol=2e-5 * scale)
    assert missing[29] < 0.8 * max(missing), missing


@pytest.mark.parametrize("name", ["bf16", "fp16", "int8", "powersgd"])
@pytest.mark.parametrize("nodes", [1, 2])
def test_parts_are_those_of_the_whole_mean(name, nodes):
    """Powersgd slices the whole mean; the others round the same values in other blocks."""
    axes = {"node": nodes, "data": 4}
    compression = FEEDBACK.get(name, name)
    grads = cases.gradients(4 * nodes)
    wanted = cases.Run(compression, axes).step(grads)
    found = cases.Run(compression, axes, layouts=SPLIT).step(grads)
    scale = max(np.abs(g).max() for g in grads.values())
    atol = 1e-6 if name == "powersgd" else 0.02 * scale
    for key, mean in wanted.items():
        np.testing.assert_allclose(found[key], mean, atol=atol)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["bf16", "fp16", "int8", *list(FEEDBACK)[1:]])
def test_what_is_not_finite_stays_visible(name, value):
    run, grads = cases.Run(FEEDBACK.get(name, name), {"data": 4}), cases.gradients(4)
    grads["w"][2, 3, 5] = value
    assert not np.isfinite(run.step(grads)["w"]).all()


def test_fp16_holds_what_float16_does_not():
    """The sum over the devices and the largest value, and small values beside nothing larger."""
    run = cases.Run("fp16", {"data": 8}, {"w": (512,)})
    for size in (3e38 / 8, 1e5, 1e-30):
        grads = {"w": np.full((8, 512), size, np.float32)}
        np.testing.assert_allclose(run.step(grads)["w"], grads["w"][0], rtol=1e-3)


def test_zero_gradients_leave_powersgd_alive():
    """A factor of zeros would stay so for ever."""
    run = cases.Run(tx.compression.powersgd(2), {"data": 2}, {"w": (32, 24)})
    zero = {"w": np.zeros((2, 32, 24), np.float32)}
    for _ in range(3):
        np.testing.assert_array_equal(run.step(zero)["w"], 0)
    rng = np.random.default_rng(0)
    low = np.stack([rng.normal(size=(32, 2)) @ rng.normal(size=(2, 24))] * 2).astype(np.float32)
    np.testing.assert_allclose(run.step({"w": low})["w"], low[0], atol=1e-4)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_columns_are_orthonormal_where_they_are_nearly_parallel(scale):
    rng = np.random.default_rng(0)
    first = rng.normal(size=(50, 1))
    matrix = np.concatenate([first, first + 1e-6 * rng.normal(size=(50, 1)), 0 * first], axis=1)
    found = np.float64(orthonormalize(jnp.float32(scale * matrix)))
    np.testing.assert_allclose(found.T @ found, np.diag([1, 1, 0]), atol=1e-5)


def test_powersgd_finds_a_matrix_of_its_rank():
    rng = np.random.default_rng(1)
    run = cases.Run(tx.compression.powersgd(2), {"data": 4}, {"w": (30, 20)})
    left = rng.normal(size=(30, 2))
    grads = {"w": np.float32(np.stack([left @ rng.normal(size=(2, 20)) for _ in range(4)]))}
    np.testing.assert_allclose(run.step(grads)["w"], grads["w"].mean(0), atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gradients_of_every_dtype_have_wide_errors(dtype):
    params = {"w": jax.ShapeDtypeStruct((40, 40), dtype), "n": jax.ShapeDtypeStruct((3,), "int32")}
    mesh = tx.MeshSpec(jax.devices()[:2])
    state, _ = tx.compression.start("int8", params, "data", mesh)
    assert state["compression"]["errors"]["w"].dtype == np.float32
    assert state["compression"]["errors"]["n"] is None


def test_integers_and_complex_numbers_are_averaged_exactly():
    def f(x):
        tree = {"n": x.astype(jnp.int32), "c": x * 1j, "w": x}
        whole = tx.sync_gradients(tree, "data", compression="bf16")[0]
        return whole, tx.sync_gradients(tree, "data", compression="bf16", buckets=1)[0]

    x = np.arange(2.0, dtype=np.float32)
    for found in tx.testing.run_sharded(f, x, axes={"data": 2}, out_specs=P()):
        assert [found[name].tolist() for name in "ncw"] == [[0.5], [0.5j], [0.5]]


@pytest.mark.parametrize("name", ["int8", "top-k"])
def test_one_device_adds_what_is_pending(name):
    run = cases.Run(FEEDBACK[name], {"data": 1})
    grads = cases.gradients(1)
    run.state = jax.tree.map(lambda x: x + 1, run.state)
    for key, mean in run.step(grads).items():
        np.testing.assert_allclose(mean, grads[key][0] + 1, rtol=1e-6)
    for key, mean in run.step(grads).items():
        np.testing.assert_array_equal(mean, grads[key][0])


def test_a_compression_of_ones_own():
    """The sign alone, with the mean size: as the docstring of Compression has it."""

    def average(grads, kept, exchange):
        signs = [jnp.sign(g) * jnp.mean(jnp.abs(g)) for g in grads]
        errors = [g - sign for g, sign in zip(grads, signs, strict=True)]
        return tx.pmean(signs, exchange.axes, name=exchange.name), errors, kept

    def sends(shapes, exchange):
        return [exchange.predict("all-reduce", "float32", *(x.size for x in shapes))]

    sign = tx.compression.Compression("sign", average, sends, feedback=True)
    run, grads = cases.Run(sign, {"data": 4}), cases.gradients(4)
    means, exact = run.step(grads), cases.exact(grads)
    for key in exact:
        np.testing.assert_allclose(
            means[key] + run.pending[key], exact[key], atol=1e-6 * np.abs(grads[key]).max()
        )


REFUSED = [
    (lambda: tx.DP("data", compression="int4"), ValueError, "needs compression= 'bf16', 'fp16'"),
    (lambda: tx.DP("data", compression=tx.compression.int8), TypeError, "call it"),
    (
        lambda: tx.DP("data", shard="parameters", compression="int8"),
        ValueError,
        "'parameters': what it keeps",
    ),
    (
        lambda: tx.DP("data", shard="gradients", compression=tx.compression.top_k()),
        ValueError,
        "Write 'bf16', 'fp16' or tx.compression.int8(feedback=False), which keep nothing",
    ),
    (lambda: tx.DP("data", sync_every=4, compression="int8"), ValueError, "no gradient is sent"),
    (lambda: tx.DP("data", reduction="adasum", compression="int8"), ValueError, "of its own"),
    (lambda: tx.compression.int8(feedback=1), TypeError, "int8 needs feedback= True or False, got"),
    (lambda: tx.DP("data", algorithm="ring", compression="int8"), ValueError, "leave one of them"),
    (lambda: tx.compression.top_k(0), ValueError, "top_k needs fraction= above 0 and at most 1"),
    (lambda: tx.compression.top_k(True), ValueError, "got True"),
    (lambda: tx.compression.powersgd(0), ValueError, "powersgd needs rank= a whole number from 1"),
    (lambda: tx.compression.powersgd(1, start=-1), ValueError, "powersgd needs start= a whole"),
]


@pytest.mark.parametrize("make, error, text", REFUSED)
def test_what_is_refused(make, error, text):
    with pytest.raises(error, match=re.escape(text)):
        make()


def sync(grads, **options):
    def f(g):
        return tx.sync_gradients(g, "data", **options)[0]

    return tx.testing.run_sharded(f, grads, axes={"data": 2}, out_specs=P())


def test_state_is_asked_for():
    with pytest.raises(ValueError, match="needs comm_state= what it keeps from step to step"):
        sync(np.zeros(4, np.float32), compression="int8")


def test_state_of_other_gradients_is_refused():
    mesh = tx.MeshSpec(jax.devices()[:2])
    for params in ({"v": np.zeros(2, np.float32)}, {"w": np.zeros(3, np.float32)}):
        state, _ = tx.compression.start("int8", params, "data", mesh)
        with pytest.raises(ValueError, match="the gradients that its comm_state was made for"):
            sync({"w": np.zeros(4, np.float32)}, compression="int8", comm_state=state)


def test_gradients_that_are_reduced_already_are_refused():
    def f(g):
        return tx.sync_gradients(tx.pmean(g, "data"), "data", compression="bf16")[0]

    with pytest.raises(ValueError, match="does not vary along it"):
        tx.testing.run_sharded(f, np.zeros(4), axes={"data": 2}, out_specs=P())
