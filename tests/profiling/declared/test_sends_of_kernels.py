"""Pallas kernels that send by remote DMA: what they declare, and custom calls that nobody does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from audit_cases import on
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore.profiling import audit
from txcore.profiling.declared.collectives import list_declared
from txcore.profiling.declared.divergence import find_divergences
from txcore.profiling.hlo import find_collectives
from txcore.profiling.matching.match import match_collectives
from txcore.profiling.matching.rows import rows_of


def tpu_mesh(**axes):
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=None, platform="tpu")
    kinds = (AxisType.Auto,) * len(axes)
    return AbstractMesh(tuple(axes.values()), tuple(axes), kinds, abstract_device=device)


def declared_by(body, *shapes, axes=None, **options):
    mesh = tpu_mesh(**(axes or {"data": 8}))
    with jax.sharding.use_abstract_mesh(mesh):
        f = jax.shard_map(body, in_specs=P(), out_specs=P(), check_vma=False, **options)
        return list_declared(jax.make_jaxpr(f)(*shapes))


def array(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def ring_copy(times, *, branch=False, loop=False):
    """Return a user's own kernel that sends its operand to the next device some times."""

    def kernel(x, out, sent, received):
        index = lax.axis_index("data")

        def send(*_):
            there = {"data": lax.rem(index + 1, 8)}
            pltpu.async_remote_copy(x, out, sent, received, device_id=there).wait()

        def send_all():
            lax.fori_loop(0, index if loop else times, lambda i, carry: send(), None)

        pl.when(index == 0)(send_all) if branch else send_all()

    def body(x):
        return pl.pallas_call(
            kernel,
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            scratch_shapes=[pltpu.SemaphoreType.DMA] * 2,
            compiler_params=pltpu.CompilerParams(),
        )(x)

    return body


def test_a_kernels_copies_are_added_up_over_its_loops():
    [found] = declared_by(ring_copy(3), array(16, 128))
    wanted = ("remote-dma", "pallas_call", ("data",), 8, "float32", 3 * 16 * 128, None)
    assert (
        *(found.kind, found.primitive, found.axes, found.group_size),
        *(found.dtype, found.elements, found.tag),
    ) == wanted
    assert found.size_known
    assert found.payload_bytes == 4 * found.elements


def test_what_a_branch_or_a_loop_decides_is_not_known():
    for options in ({"branch": True}, {"loop": True}):
        [found] = declared_by(ring_copy(3, **options), array(16, 128))
        assert not found.size_known


def test_a_local_kernel_declares_nothing():
    def kernel(x, out):
        out[...] = x[...] * 2

    def body(x):
        return pl.pallas_call(kernel, jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    assert declared_by(body, array(16, 128)) == ()


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_the_bytes_of_collectives_are_those_of_the_formula(devices, dtype):
    """A ring sends n - 1 shards, each of whole tiles: of 4 KiB, in a scatter of two or more."""
    item = jnp.dtype(dtype).itemsize

    def body(x):
        part = tx.reduce_scatter(x, "data", algorithm="remote_dma", name="part")
        return tx.all_gather(part, "data", algorithm="remote_dma", name="whole")

    def total(x):
        return tx.psum(x, "data", algorithm="remote_dma", name="total")

    for shard, padded in ((128 * 256, 128 * 256), (5, None)):
        sizes = {"data": devices}
        sent = declared_by(body, array(devices * shard, dtype=dtype), axes=sizes)
        wanted = [padded * item, padded * item] if padded else [2 * 4096, 4096]
        assert [d.payload_bytes for d in sent] == [(devices - 1) * size for size in wanted]
        assert [d.tag for d in sent] == ["reduce_scatter/part", "all_gather/whole"]
        assert {(d.axes, d.group_size, d.dtype) for d in sent} == {(("data",), devices, dtype)}
        sent = declared_by(total, array(devices * shard, dtype=dtype), axes=sizes)
        of_each = padded * item if padded else 2 * 4096
        assert [d.payload_bytes for d in sent] == [(devices - 1) * of_each] * 2


def test_only_the_rings_axis_is_named():
    [found] = declared_by(
        lambda x: tx.all_gather(x, "model", algorithm="remote_dma"),
        array(8, 128),
        axes={"data": 2, "model": 4},
    )
    assert (found.axes, found.group_size) == (("model",), 4)


def divergences(axis):
    mesh = tpu_mesh(data=2, model=4)

    def body(x):
        return lax.cond(
            x[0, 0] > 0, lambda x: tx.psum(x, axis, algorithm="remote_dma", name="t"), jnp.cos, x
        )

    with jax.sharding.use_abstract_mesh(mesh):
        f = jax.shard_map(body, in_specs=P("data"), out_specs=P("data"), check_vma=False)
        return find_divergences(jax.make_jaxpr(f)(array(8, 128)))


def test_a_kernel_that_not_all_devices_reach_hangs():
    found = [(d.problem, d.name, d.kind, d.axes) for d in divergences("data")]
    assert found == [("hangs", "psum/t", "remote-dma", ("data",))]
    assert divergences("model") == (), "all devices along it agree"


CALL = (
    '%{name} = f32[16,128]{{1,0}} custom-call(%p), custom_call_target="tpu_custom_call", '
    'metadata={{op_name="jit(f)/shard_map/{path}/pallas_call"}}, backend_config='
    '{{"custom_call_config":{{"body":"TUz","has_communication":true,"collective_id":16}}}}'
)
MODULE = """HloModule m, num_partitions=8

ENTRY %main (p: f32[16,128]) -> f32[16,128] {{
  %p = f32[16,128]{{1,0}} parameter(0)
  {calls}
}}
"""


def rows(declared, *paths):
    calls = [CALL.format(name=f"call.{i}", path=path) for i, path in enumerate(paths)]
    ops = find_collectives(MODULE.format(calls="\n  ".join(calls)), devices=8)
    assert len(ops) == len(paths)
    matched = match_collectives(ops, declared, marks=True)
    return rows_of(ops, matched, declared, [(("data", 8),)])


def test_a_custom_call_gets_the_bytes_of_its_kernel():
    declared = declared_by(
        lambda x: tx.all_gather(x, "data", algorithm="remote_dma", name="w"), array(16, 128)
    )
    [row], [fate] = rows(declared, "txcore[all_gather/w]/ring_all_gather")
    found = (row.kind, row.origin, row.axes, row.group_size, row.payload_bytes, row.wire_bytes)
    assert found == ("remote-dma", "txcore", ("data",), 8, *[7 * 16 * 128 * 4] * 2)
    assert row.explained
    assert fate.fates == ("kept",)


def test_a_users_own_kernel_is_counted_as_well():
    [row], [fate] = rows(declared_by(ring_copy(3), array(16, 128)), "x")
    assert (row.origin, row.payload_bytes, row.explained) == ("user", 3 * 16 * 128 * 4, True)
    assert fate.fates == ("kept",)


def test_a_kernel_that_decides_what_it_sends_stays_opaque():
    [row], [fate] = rows(declared_by(ring_copy(3, branch=True), array(16, 128)), "x")
    assert (row.kind, row.origin, row.explained) == ("custom-call", "opaque", True)
    assert row.note == "what its kernel sends is decided when it runs"
    assert fate.fates == ("kept",)


def test_a_custom_call_that_no_kernel_declares_is_an_offence():
    declared = declared_by(ring_copy(3), array(16, 128))
    (first, second), _ = rows(declared, "x", "y")
    assert first.explained
    assert not second.explained
    assert second.note == (
        "custom call tpu_custom_call can communicate unseen, and no kernel of the traced program "
        "sends anything"
    )
    [row], _ = rows(declared, "txcore[all_gather/w]/ring_all_gather")
    assert not row.explained, "a tag that nobody declares"


def test_a_kernel_without_its_custom_call_is_missing():
    found, [fate] = rows(declared_by(ring_copy(3), array(16, 128)))
    assert found == ()
    assert fate.fates == ("missing",)


def test_a_kernels_metadata_stands_on_lines_of_its_own():
    """As XLA prints it: the lines after the first are no part of a computation."""
    plain = MODULE.format(calls=CALL.format(name="call", path="x"))
    lines = 'frontend_attributes={kernel_metadata={\n"mesh_axes":"[\\"data\\"]",\n"a":"b"\n}}, '
    split = plain.replace("metadata={op_name", lines + "metadata={op_name", 1)
    assert split.count("\n") == plain.count("\n") + 3
    [op], [wanted] = find_collectives(split, devices=8), find_collectives(plain, devices=8)
    assert op == wanted
    assert op.op_name == "jit(f)/shard_map/x/pallas_call"
    assert op.computation == "main"


def test_a_simulated_kernel_is_not_proved():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))

    def body(x):
        return tx.psum(x, "data", algorithm="remote_dma", name="total")

    with pltpu.force_tpu_interpret_mode():
        report = audit(on(mesh, P("data"), P())(body), np.ones((8, 4), np.float32))
    assert report.ok
    assert not report.exact
    assert report.status == "not proved"
    assert report.verdict() == (
        "not proved: no collective in the program, but 2 are simulated by callbacks on the host"
    )
