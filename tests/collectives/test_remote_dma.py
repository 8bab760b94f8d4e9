"""`algorithm="remote_dma"` of the collectives, the gradients' exchange and split layers.

On simulated TPUs, against NumPy; what the kernels do is tested with them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import txcore as tx

SIZES = {"node": 2, "data": 2}


def run(function, *args, sizes, **options):
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        return tx.testing.run_sharded(function, *args, axes=sizes, **options)


def test_the_collectives_by_remote_dma_are_the_collectives():
    """Of trees, over one axis of two, along any dim."""
    x = np.random.default_rng(0).normal(size=(2, 2, 6, 3)).astype(np.float32)
    specs = {"w": P("node", "data")}

    def everything(tree, algorithm):
        local = jax.tree.map(lambda leaf: leaf[0, 0], tree)
        whole = tx.all_gather(local, "data", dim=1, algorithm=algorithm)
        part = tx.reduce_scatter(whole, "data", dim=0, mean=True, algorithm=algorithm)
        total = tx.psum(part, "data", algorithm=algorithm)
        # Each after the other: a simulator may run at once what does not depend on it.
        part = jax.tree.map(lambda y, other: y + 0 * other, part, total)
        same = tx.all_gather(part, "data", invariant=True, algorithm=algorithm)
        part = jax.tree.map(lambda y, other: y + 0 * other[:3], part, same)
        mean = tx.pmean(part, "data", algorithm=algorithm)
        rows = [whole, part], [total, same, mean]
        return jax.tree.map(lambda y: y[None], rows)

    def wanted(tree):
        return everything(tree, None)

    def found(tree):
        return everything(tree, "remote_dma")

    tree = {"w": x}
    out = (P(("node", "data")), P("node"))
    expected = tx.testing.run_sharded(wanted, tree, axes=SIZES, in_specs=(specs,), out_specs=out)
    got = run(found, tree, sizes=SIZES, in_specs=(specs,), out_specs=out)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_the_gradients_go_by_remote_dma():
    w = np.arange(6, dtype=np.float32).reshape(2, 3)

    def gradients(w, x):
        local = tx.grad(lambda w: jnp.sum(w * x), axis="data")(w)
        return tx.sync_gradients({"w": local}, "data", algorithm="remote_dma")[0]["w"]

    x = np.arange(4, dtype=np.float32)
    found = run(gradients, w, x, sizes={"data": 4}, in_specs=(P(), P("data")), out_specs=P())
    np.testing.assert_allclose(found, np.full((2, 3), 1.5))


def test_split_layers_overlap_by_remote_dma():
    rng = np.random.default_rng(0)
    x, a, b = (rng.normal(size=s).astype(np.float32) for s in ((2, 6, 4), (4, 6), (6, 5)))

    def layers(x, a, b):
        options = {"axis": "model", "overlap": True, "algorithm": "remote_dma"}
        wide = tx.tensor.column_dense(x, a, gather_dim=1, **options)
        return tx.tensor.row_dense(wide, b, scatter_dim=1, **options)

    specs = (P(None, "model"), P(None, "model"), P("model"))
    found = run(layers, x, a, b, sizes={"model": 2}, in_specs=specs, out_specs=P(None, "model"))
    np.testing.assert_allclose(found, np.float64(x) @ a @ b, rtol=0, atol=1e-4)


def error_of(function, *, shape=(4, 4), dtype=np.float32, sizes=None, simulate=True):
    sizes = sizes or {"data": 2}
    x = np.zeros(shape, dtype)
    call = run if simulate else lambda *a, sizes, **o: tx.testing.run_sharded(*a, axes=sizes, **o)
    with pytest.raises((ValueError, TypeError, NotImplementedError)) as error:
        call(function, x, sizes=sizes, in_specs=P(*sizes), out_specs=P(*sizes))
    return f"{type(error.value).__name__}: {error.value}"


def test_what_remote_dma_cannot_do_is_refused():
    assert error_of(lambda x: tx.all_gather(x, "data", algorithm="ring")) == (
        "ValueError: tx.all_gather needs algorithm= 'remote_dma' or None, got 'ring'"
    )
    assert error_of(
        lambda x: tx.psum({"w": x}, ("node", "data"), algorithm="remote_dma", name="g"), sizes=SIZES
    ) == (
        "ValueError: tx.psum needs one mesh axis, a ring, with algorithm='remote_dma', got "
        "('node', 'data'): call it once for each axis, or leave algorithm= out"
    )
    assert error_of(
        lambda x: tx.reduce_scatter({"w": x}, "data", algorithm="remote_dma", name="g"),
        dtype=np.float16,
    ) == (
        "TypeError: tx.reduce_scatter needs arrays of float32, bfloat16, int32 with "
        "algorithm='remote_dma', got float16 at g['w']: cast it, or leave algorithm= out"
    )
    assert error_of(
        lambda x: tx.tensor.row_dense(x, x, axis="data", scatter_dim=0, algorithm="remote_dma")
    ) == (
        "ValueError: tensor.row_dense needs overlap=True with algorithm='remote_dma', got False: "
        "it is of the ring that overlaps"
    )
    assert error_of(
        lambda x: tx.sync_gradients(x, ("node", "data"), algorithm="remote_dma"), sizes=SIZES
    ) == (
        "ValueError: algorithm='remote_dma' needs one axis of more than one device, got "
        "('node', 'data'): shard the state over one of them, or write algorithm=None"
    )


ON_CPU = (
    "NotImplementedError: {op} needs TPUs, or the GPUs of one node, got platform 'cpu': leave "
    "algorithm= out, or to test the kernel on CPU pass interpret=True, or run under "
    "jax.experimental.pallas.tpu.force_tpu_interpret_mode()"
)


@pytest.mark.parametrize(
    "op, call",
    [
        ("ring_all_gather", lambda x: tx.all_gather(x, "data", algorithm="remote_dma")),
        ("ring_reduce_scatter", lambda x: tx.reduce_scatter(x, "data", algorithm="remote_dma")),
        ("ring_all_reduce", lambda x: tx.pmean(x, "data", algorithm="remote_dma")),
        (
            "algorithm='remote_dma'",
            lambda x: tx.sync_gradients(x, "data", algorithm="remote_dma")[0],
        ),
    ],
)
def test_on_cpu_it_is_refused_with_the_alternatives(op, call):
    assert error_of(call, simulate=False) == ON_CPU.format(op=op)


def test_on_an_older_gpu_it_is_refused_with_the_alternative():
    device = AbstractDevice(device_kind="NVIDIA A100", num_cores=None, platform="gpu")
    mesh = AbstractMesh((8,), ("data",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(NotImplementedError) as error:
        jax.eval_shape(
            jax.shard_map(
                lambda x: tx.psum(x, "data", algorithm="remote_dma"),
                in_specs=P("data"),
                out_specs=P(),
            ),
            jax.ShapeDtypeStruct((8, 4), jnp.float32),
        )
    assert str(error.value) == (
        "ring_all_reduce on GPUs needs those of a node with a switch that adds, GB200, GB300, "
        "H100, H200, B200, B300, got 'NVIDIA A100': leave algorithm= out: XLA calls NCCL there"
    )
