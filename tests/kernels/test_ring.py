"""Collectives by remote DMA on simulated TPUs: values against float64 NumPy, and no race."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ring_cases import assert_near, found_race, make_rows, mesh_of, run_ring, simulated, wide

from txcore.kernels import ring
from txcore.kernels.ring import blocks, neighbours

pytestmark = [pytest.mark.usefixtures("unoptimized"), pytest.mark.sampled(2)]

CASES = [(2, "float32"), (4, "bfloat16"), (4, "int32"), (8, "float32")]


@pytest.fixture
def small_chunks(monkeypatch):
    """Cut arrays of some thousand elements into chunks of one tile."""
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 4096)


@pytest.mark.parametrize(("devices", "dtype"), CASES)
def test_all_gather(devices, dtype):
    x = make_rows(devices, (3, 5), dtype)
    found = run_ring(
        lambda v: ring.ring_all_gather(v, "data", dim=1, interpret=simulated()),
        *(mesh_of(data=devices), x),
    )
    for row in found:
        np.testing.assert_array_equal(row, np.concatenate(list(x), axis=1))
    assert not found_race()


@pytest.mark.parametrize(("devices", "dtype"), CASES)
def test_reduce_scatter(devices, dtype):
    x = make_rows(devices, (3, devices * 5), dtype)
    found = run_ring(
        lambda v: ring.ring_reduce_scatter(v, "data", dim=1, interpret=simulated()),
        *(mesh_of(data=devices), x),
    )
    wanted = np.split(wide(x).sum(0), devices, axis=1)
    assert_near(found, wanted, dtype)
    assert not found_race()


@pytest.mark.parametrize(("devices", "dtype"), CASES)
def test_all_reduce(devices, dtype):
    x = make_rows(devices, (7, 3), dtype)
    found = run_ring(
        lambda v: ring.ring_all_reduce(v, "data", interpret=simulated()),
        *(mesh_of(data=devices), x),
        out_specs=P(),
    )
    assert_near(found, wide(x).sum(0), dtype)
    assert not found_race()


@pytest.mark.parametrize("axis", ["node", "data"])
def test_one_axis_of_two(axis):
    mesh = mesh_of(node=2, data=4)
    x = make_rows(8, (5,))

    def both(v):
        total = ring.ring_all_reduce(v, axis, interpret=simulated())
        return ring.ring_all_gather(v + 0 * total, axis, interpret=simulated()), total + 0 * v

    gathered, total = run_ring(both, mesh, x)
    along = list(mesh.axis_names).index(axis)
    grid = x.reshape(2, 4, 5)
    sums = np.broadcast_to(wide(grid).sum(along, keepdims=True), grid.shape)
    assert_near(total, sums.reshape(8, 5), "float32")
    of_ring = np.moveaxis(grid, along, 1)  # (others, ring, 5)
    wanted = np.stack([of_ring[i // 4 if along else i % 4].reshape(-1) for i in range(8)])
    np.testing.assert_array_equal(gathered, wanted)
    assert not found_race()


@pytest.mark.parametrize("mode", ["on_wait", "eager"])
def test_many_chunks_go_through_two_slots(small_chunks, mode):
    """Whether copies happen at once or as late as they may."""
    devices = 4
    x = make_rows(devices, (devices * 5000,))
    assert blocks.lay_in_rows((5000,), x.dtype, parts=2).chunks == 6
    params = simulated(dma_execution_mode=mode)
    found = run_ring(
        lambda v: ring.ring_reduce_scatter(v, "data", interpret=params), mesh_of(data=devices), x
    )
    assert_near(found, wide(x).sum(0).reshape(devices, -1), "float32")
    assert not found_race()


def test_without_credit_a_sender_overruns_its_neighbour(small_chunks, monkeypatch):
    """The planted race: nobody waits for room."""
    monkeypatch.setattr(neighbours, "take_room", lambda credit: None)
    x = make_rows(4, (4 * 5000,))
    run_ring(
        lambda v: ring.ring_reduce_scatter(v, "data", interpret=simulated()), mesh_of(data=4), x
    )
    assert found_race()


def test_without_waiting_for_a_block_it_is_passed_on_unread(monkeypatch):
    """The planted race: a device does not wait for what it passes on."""
    copy = neighbours.copy_to_neighbour

    class NoWait:
        def __init__(self, *args):
            self._copy = copy(*args)
            self.start, self.wait_send = self._copy.start, self._copy.wait_send

        def wait_recv(self):
            pass

    monkeypatch.setattr(neighbours, "copy_to_neighbour", NoWait)
    x = make_rows(4, (40,))
    eager = simulated(dma_execution_mode="eager")
    run_ring(lambda v: ring.ring_all_gather(v, "data", interpret=eager), mesh_of(data=4), x)
    assert found_race()


@pytest.mark.parametrize(("devices", "check_vma"), [(4, True), (2, False)])
def test_transposes(devices, check_vma):
    """That of a gather is a reduce-scatter and the other way round."""
    params = simulated()
    x, whole = make_rows(devices, (6,)), make_rows(devices, (devices * 6,), seed=1)

    def derivatives(shard, g):
        gathered = jax.vjp(lambda v: ring.ring_all_gather(v, "data", interpret=params), shard)[1]
        scattered = jax.vjp(lambda v: ring.ring_reduce_scatter(v, "data", interpret=params), g)[1]
        (back,) = gathered(g)
        (forth,) = scattered(back)
        return back, forth

    back, forth = run_ring(derivatives, mesh_of(data=devices), x, whole, check_vma=check_vma)
    wanted = wide(whole).sum(0).reshape(devices, 6)
    assert_near(back, wanted, "float32")
    for row in forth:
        assert_near(row, wanted.reshape(-1), "float32")
    assert not found_race()


@pytest.mark.parametrize("check_vma", [True, False])
def test_transposes_of_what_is_equal(check_vma):
    devices, params = 2, simulated()
    x, w = make_rows(devices, (5,)), np.arange(1.0, 6, dtype=np.float32)
    w2 = np.arange(1.0, 11, dtype=np.float32)

    def loss(v):
        total = ring.ring_all_reduce(v, "data", interpret=params)
        shards = ring.ring_all_gather(v + 0 * total, "data", invariant=True, interpret=params)
        return jnp.sum(w * total) + jnp.sum(w2 * shards)

    found = run_ring(jax.grad(loss), mesh_of(data=devices), x, check_vma=check_vma)
    # Untracked, each device's loss counts: jax's psum is its own transpose there.
    times = 1 if check_vma else devices
    assert_near(found, times * (w + w2.reshape(devices, 5)), "float32")


def test_a_ring_of_one_device_sends_nothing():
    x = make_rows(1, (4,))

    def same(v):
        scattered = ring.ring_reduce_scatter(ring.ring_all_gather(v, "data"), "data")
        return ring.ring_all_reduce(scattered, "data")

    with pytest.raises(NotImplementedError, match="ring_all_gather needs TPUs"):
        run_ring(same, mesh_of(data=1), x)
    params = simulated()
    found = run_ring(
        lambda v: ring.ring_all_reduce(
            ring.ring_all_gather(v, "data", interpret=params), "data", interpret=params
        ),
        *(mesh_of(data=1), x),
        out_specs=P(),
    )
    np.testing.assert_array_equal(found, x[0])


def refused(error, text, function, shape=(4,), dtype="float32", **options):
    x = np.zeros((2, *shape), jnp.dtype(dtype))
    with pytest.raises(error, match=text):
        run_ring(function, mesh_of(data=2), x, **options)


def test_what_no_ring_can_run_is_refused():
    params = simulated()
    refused(
        NotImplementedError,
        "ring_all_reduce needs TPUs, or the GPUs of one node, got platform 'cpu': leave "
        "algorithm= out, or to test the kernel on CPU pass interpret=True",
        lambda v: ring.ring_all_reduce(v, "data"),
    )
    refused(
        TypeError,
        "ring_all_gather needs x of dtype float32, bfloat16, int32, got float16: cast it",
        lambda v: ring.ring_all_gather(v, "data", interpret=params),
        dtype="float16",
    )
    refused(
        TypeError,
        "ring_all_gather needs axis= one mesh axis, a ring of devices, got \\('data',\\)",
        lambda v: ring.ring_all_gather(v, ("data",), interpret=params),
    )
    refused(
        NameError,
        "ring_all_gather needs a mesh axis that is bound here, got 'model', where the bound ones "
        "are 'data'",
        lambda v: ring.ring_all_gather(v, "model", interpret=params),
    )
    refused(
        ValueError,
        "ring_reduce_scatter over 'data' needs dim=0 of x divisible by 2, got shape \\(5,\\): pad "
        "it to 6",
        lambda v: ring.ring_reduce_scatter(v, "data", interpret=params),
        shape=(5,),
    )
    refused(
        ValueError,
        "ring_all_gather needs dim= a dim of x, which has shape \\(\\), got 0; give a scalar",
        lambda v: ring.ring_all_gather(v, "data", interpret=params),
        shape=(),
    )
    refused(
        NotImplementedError,
        "ring_all_gather needs whole arrays, got a row of what jax.vmap goes over: call it outside",
        lambda v: jax.vmap(lambda row: ring.ring_all_gather(row, "data", interpret=params))(v),
        shape=(2, 3),
    )


def test_arrays_without_elements():
    params = simulated()
    x = np.zeros((2, 4, 0), np.float32)

    def all_three(v):
        whole = ring.ring_all_gather(v, "data", dim=1, interpret=params)
        part = ring.ring_reduce_scatter(whole, "data", interpret=params)
        return part, ring.ring_all_reduce(part, "data", interpret=params)

    part, total = run_ring(all_three, mesh_of(data=2), x)
    assert (part.shape, total.shape) == ((2, 2, 0), (2, 2, 0))
