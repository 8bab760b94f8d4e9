"""The ops under jax's transformations and inside shard_map give what they give outside."""

import functools

import jax
import jax.numpy as jnp
import machine
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from kernel_cases import CASES, FIRST_CONV, ODD_CONV, RELU_DENSE

from txcore import kernels

pytestmark = [pytest.mark.usefixtures("unoptimized"), pytest.mark.sampled(2)]

WEIGHTED = [FIRST_CONV, ODD_CONV, RELU_DENSE]
AXIS = "data"


def name(case):
    return case.name


@pytest.fixture(scope="module")
def mesh():
    return machine.mesh(data=2)


def gradients(case, args):
    """Return the gradients of the sum of squares of the op's output."""
    return gradient_of(case.name)(*args)


@functools.cache
def gradient_of(name):
    """Return the compiled gradient of a case, which many tests compare with."""
    case = next(case for case in CASES if case.name == name)
    everything = tuple(range(len(case.shapes)))
    return jax.jit(jax.grad(lambda *a: (case.op(*a) ** 2).sum(), everything))


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), got, want)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_remat_and_no_jit(case):
    args = case.args(jnp.float32)
    everything = tuple(range(len(args)))
    remat = jax.grad(lambda *a: (jax.checkpoint(case.op)(*a) ** 2).sum(), everything)
    want = gradients(case, args)
    assert_close(jax.jit(remat)(*args), want)
    eager, vjp = jax.vjp(case.op, *args)
    assert_close(vjp(2 * eager), want)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_vmap_of_the_op_and_of_its_gradient(case):
    rows = [case.args(jnp.float32, seed) for seed in range(3)]
    stacked = [jnp.stack(column) for column in zip(*rows, strict=True)]
    assert_close(jax.jit(jax.vmap(case.op))(*stacked), jnp.stack([case.op(*row) for row in rows]))
    want = [gradients(case, row) for row in rows]
    got = jax.jit(jax.vmap(lambda *a: gradients(case, a)))(*stacked)
    assert_close(got, tuple(jnp.stack(column) for column in zip(*want, strict=True)))


@pytest.mark.parametrize("case", WEIGHTED, ids=name)
def test_gradients_by_example_with_shared_weights(case):
    x, w, b = case.args(jnp.float32)
    by_example = jax.vmap(lambda row: gradients(case, (row[None], w, b))[1])
    assert_close(jax.jit(by_example)(x).sum(0), gradients(case, (x, w, b))[1])


@pytest.mark.parametrize("case", WEIGHTED, ids=name)
def test_scan_over_chunks_adds_up_to_the_whole(case):
    x, w, b = case.args(jnp.float32)
    chunks = x.reshape(2, 2, *x.shape[1:])

    def loss(w, b):
        return lax.scan(lambda s, part: (s + (case.op(part, w, b) ** 2).sum(), None), 0.0, chunks)[
            0
        ]

    assert_close(jax.jit(jax.grad(loss, (0, 1)))(w, b), gradients(case, (x, w, b))[1:])


@pytest.mark.parametrize("weights", ["invariant", "varying", "unchecked"])
@pytest.mark.parametrize("case", WEIGHTED, ids=name)
def test_shard_map_gives_each_device_its_part_and_the_gradients_add_up(case, weights, mesh):
    args = case.args(jnp.float32)

    def on_device(x, w, b):
        if weights == "varying":
            w, b = (lax.pcast(a, (AXIS,), to="varying") for a in (w, b))
        out = case.op(x, w, b)
        dx, dw, db = gradients(case, (x, w, b))
        if weights != "invariant":  # then autodiff has added the devices' parts already
            dw, db = lax.psum((dw, db), AXIS)
        return out, dx, dw, db

    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(P(AXIS), P(), P()),
        out_specs=(P(AXIS), P(AXIS), P(), P()),
        check_vma=weights != "unchecked",
    )
    assert_close(jax.jit(mapped)(*args), (case.op(*args), *gradients(case, args)))


@pytest.mark.parametrize("checked", [True, False])
def test_shard_map_of_a_weight_split_by_output_channel(checked, mesh):
    x, w, b = FIRST_CONV.args(jnp.float32)
    mapped = jax.shard_map(
        lambda x, w, b: (FIRST_CONV.op(x, w, b), *gradients(FIRST_CONV, (x, w, b))[1:]),
        mesh=mesh,
        in_specs=(P(), P(None, None, None, AXIS), P(AXIS)),
        out_specs=(P(None, None, None, AXIS), P(None, None, None, AXIS), P(AXIS)),
        check_vma=checked,
    )
    want = (FIRST_CONV.op(x, w, b), *gradients(FIRST_CONV, (x, w, b))[1:])
    assert_close(jax.jit(mapped)(x, w, b), want)


@pytest.mark.parametrize("checked", [True, False])
def test_cross_entropy_in_shard_map_with_varying_labels(checked, mesh):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 10)), jnp.float32)
    labels = jnp.array([1, 2, 3, 4])

    def on_device(logits, labels):
        return kernels.cross_entropy(logits, labels), jax.grad(
            lambda x: kernels.cross_entropy(x, labels).sum()
        )(logits)

    mapped = jax.shard_map(
        on_device, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=checked
    )
    assert_close(jax.jit(mapped)(logits, labels), on_device(logits, labels))


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_ops_add_no_collective(case, mesh):
    spec = tuple(P(AXIS) if i == 0 else P() for i in range(len(case.shapes)))
    mapped = jax.shard_map(case.op, mesh=mesh, in_specs=spec, out_specs=P(AXIS))
    if case.name == "cross_entropy":  # its labels are those of the whole batch
        mapped = jax.shard_map(
            lambda x: kernels.cross_entropy(x, jnp.zeros(len(x), int)),
            mesh=mesh,
            in_specs=spec,
            out_specs=P(AXIS),
        )
    hlo = jax.jit(mapped).lower(*case.args(jnp.float32)).compile().as_text()
    assert not any(op in hlo for op in ("all-reduce", "all-gather", "all-to-all", "permute"))


@pytest.mark.parametrize("case", CASES, ids=name)
def test_forward_mode_is_refused_by_jax(case):
    args = case.args(jnp.float32)
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jvp(case.op, args, args)


@machine.cpu_only("it counts the products of a form for CPUs")
def test_the_unused_gradient_of_the_images_costs_nothing():
    args = FIRST_CONV.args(jnp.float32)

    def products(*wanted):
        gradients = jax.jit(jax.grad(lambda x, w, b: FIRST_CONV.op(x, w, b).sum(), wanted))
        return gradients.lower(*args).compile().as_text().count(" dot(")

    assert products(1, 2) == products(0, 1, 2) - 4  # one for each place in a pooling window
