"""The losses under jax's transformations and inside shard_map give what they give outside."""

import functools

import jax
import jax.numpy as jnp
import machine
import numpy as np
import pytest
from cross_entropy_cases import Loss, blocked, with_options
from jax import lax
from jax.sharding import PartitionSpec as P
from kernel_cases import both

pytestmark = [pytest.mark.usefixtures("unoptimized"), pytest.mark.sampled(2)]

AXIS = "data"
LOGITS, LINEAR = Loss((18,), 37), Loss((18,), 37, features=7)
BOTH, LINEARS = blocked(LOGITS, LINEAR), blocked(LINEAR)


@pytest.fixture(scope="module")
def mesh():
    return machine.mesh(data=2)


def gradients(loss, variant, args, labels):
    """Return the gradients of the sum of squares of the losses."""

    def total(*args):
        return (loss.op(*args, labels=labels, **variant.options) ** 2).sum()

    return jax.grad(total, tuple(range(len(args))))(*args)


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), got, want)


@functools.cache
def truth(loss):
    """Return the losses and gradients of plain jax."""
    args = loss.args()

    def total(*args):
        return (loss.plain(*args) ** 2).sum()

    return loss.plain(*args), jax.jit(jax.grad(total, tuple(range(len(args)))))(*args)


@pytest.mark.parametrize("loss, variant", BOTH)
def test_remat(loss, variant):
    op = jax.checkpoint(with_options(loss, variant))
    grad = jax.grad(lambda *a: (op(*a) ** 2).sum(), tuple(range(len(loss.shapes))))
    assert_close(jax.jit(grad)(*loss.args()), truth(loss)[1])


@pytest.mark.parametrize("loss, variant", BOTH)
def test_vmap_of_the_losses_and_of_their_gradients(loss, variant):
    seeds = [loss.args(seed=seed) for seed in range(2)]
    stacked = [jnp.stack(column) for column in zip(*seeds, strict=True)]
    labels = jnp.stack([loss.labels, (loss.labels + 1) % loss.classes])

    def one(labels, *args):
        out = loss.op(*args, labels=labels, **variant.options)
        return out, gradients(loss, variant, args, labels)

    got = jax.jit(jax.vmap(one))(labels, *stacked)
    want = [jax.jit(one)(labels[i], *seeds[i]) for i in range(2)]
    assert_close(got, jax.tree.map(lambda *a: jnp.stack(a), *want))


@pytest.mark.parametrize("loss, variant", LINEARS)
def test_gradients_by_example_with_shared_weights(loss, variant):
    x, w, b = loss.args()

    def one(row, label):
        return gradients(loss, variant, (row[None], w, b), label[None])[1]

    by_example = jax.jit(jax.vmap(one))(x, loss.labels)
    assert_close(by_example.sum(0), truth(loss)[1][1])


@pytest.mark.parametrize("loss, variant", LINEARS)
def test_scan_over_chunks_adds_up_to_the_whole(loss, variant):
    x, w, b = loss.args()
    chunks = x.reshape(2, 9, 7), loss.labels.reshape(2, 9)

    def total(w, b):
        def add(sum_, chunk):
            out = loss.op(chunk[0], w, b, labels=chunk[1], **variant.options)
            return sum_ + (out**2).sum(), None

        return lax.scan(add, 0.0, chunks)[0]

    assert_close(jax.jit(jax.grad(total, (0, 1)))(w, b), truth(loss)[1][1:])


@pytest.mark.parametrize("weights", ["invariant", "varying", "unchecked"])
@pytest.mark.parametrize("loss, variant", BOTH)
def test_shard_map_gives_each_device_its_part(loss, variant, weights, mesh):
    def on_device(labels, x, *weight):
        if weights == "varying":
            weight = tuple(lax.pcast(a, (AXIS,), to="varying") for a in weight)
        out = loss.op(x, *weight, labels=labels, **variant.options)
        dx, *dweight = gradients(loss, variant, (x, *weight), labels)
        if weights != "invariant" and dweight:  # else autodiff has added the devices' parts
            dweight = lax.psum(dweight, AXIS)
        return out, (dx, *dweight)

    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(P(AXIS), P(AXIS), *(P(),) * (len(loss.shapes) - 1)),
        out_specs=(P(AXIS), (P(AXIS), *(P(),) * (len(loss.shapes) - 1))),
        check_vma=weights != "unchecked",
    )
    assert_close(jax.jit(mapped)(loss.labels, *loss.args()), truth(loss))


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("loss, variant", LINEARS)
def test_shard_map_of_weights_that_differ(loss, variant, checked, mesh):
    """Each device has classes of its own: as a model of several heads has."""
    x, w, b = loss.args()
    heads = jnp.concatenate([w, 2 * w], 1), jnp.concatenate([b, b + 1])

    def on_device(labels, x, w, b):
        out = loss.op(x, w, b, labels=labels, **variant.options)
        _, dw, db = gradients(loss, variant, (x, w, b), labels)
        return out, dw, db

    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(P(), P(), P(None, AXIS), P(AXIS)),
        out_specs=(P(AXIS), P(None, AXIS), P(AXIS)),
        check_vma=checked,
    )
    first = jax.jit(on_device)(loss.labels, x, w, b)
    second = jax.jit(on_device)(loss.labels, x, 2 * w, b + 1)
    want = [jnp.concatenate(pair, -1) for pair in zip(first, second, strict=True)]
    assert_close(jax.jit(mapped)(loss.labels, x, *heads), tuple(want))


@pytest.mark.parametrize("loss, variant", BOTH)
def test_no_collective_is_added(loss, variant, mesh):
    mapped = jax.shard_map(
        lambda labels, *args: loss.op(*args, labels=labels, **variant.options),
        mesh=mesh,
        in_specs=(P(AXIS), P(AXIS), *(P(),) * (len(loss.shapes) - 1)),
        out_specs=P(AXIS),
    )
    hlo = jax.jit(mapped).lower(loss.labels, *loss.args()).compile().as_text()
    assert not any(op in hlo for op in ("all-reduce", "all-gather", "all-to-all", "permute"))


@pytest.mark.parametrize("loss, variant", blocked(LINEAR))
def test_each_example_has_its_own_cotangent(loss, variant):
    args = loss.args()
    weight = jnp.arange(18.0) - 3  # of either sign, and 0
    got = jax.vjp(with_options(loss, variant), *args)[1](weight)
    want = jax.vjp(loss.plain, *args)[1](weight)
    assert_close(got, want)


def test_a_sequence_is_its_rows():
    loss, rows = Loss((2, 9), 37, features=7), Loss((18,), 37, features=7)
    x, w, b = loss.args()
    out, (dx, dw, _) = both(loss.op, [x, w, b])
    flat, (dx_flat, dw_flat, _) = both(
        lambda *a: rows.op(*a, labels=loss.labels.reshape(-1)), [x.reshape(18, 7), w, b]
    )
    np.testing.assert_array_equal(out.reshape(-1), flat)
    # The cotangents are drawn by shape, row by row.
    np.testing.assert_allclose(dx.reshape(18, 7), dx_flat, rtol=1e-6)
    np.testing.assert_allclose(dw, dw_flat, rtol=1e-6)


def test_forward_mode_is_refused_by_jax():
    args = LINEAR.args()
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jvp(LINEAR.op, args, args)


def test_the_operations_are_named():
    hlo = jax.jit(LINEAR.op).lower(*LINEAR.args()).compile().as_text()
    assert "kernel.linear_cross_entropy.xla" in hlo
