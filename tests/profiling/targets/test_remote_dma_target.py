"""Collectives by remote DMA, compiled by the whole of Mosaic for TPUs that are not here.

The audit finds each kernel's custom call in the optimized module, with the bytes of the formula.
"""

import math
import os

import jax
import jax.numpy as jnp
import pytest
from audit_cases import P, on, shape
from target_cases import audit_remote_exchange, available

import txcore as tx
from txcore import kernels
from txcore.profiling import audit, costs
from txcore.profiling.targets import parse_target

TARGETS = ["tpu:v5e:2x4", "tpu:v6e:2x4"]
MESHES = [{"data": 8}, {"data": 4, "model": 2}]
DTYPES = ["float32", "bfloat16", "int32"]


def audited(body, target, sizes, *arguments, out_specs):
    """Audit a function of arrays, each given as (dims, dtype, spec)."""

    def build(mesh):
        specs = tuple(spec for *_, spec in arguments)
        args = tuple(shape(mesh, spec, *dims, dtype=dtype) for dims, dtype, spec in arguments)
        return on(mesh, specs, out_specs)(body), args

    return audit(build, target=available(target), mesh=sizes)


def tiles(elements, dtype, parts):
    """Return the bytes of an array in whole tiles of 4 KiB, of as many in each part."""
    size = elements * jnp.dtype(dtype).itemsize
    return parts * math.ceil(math.ceil(size / 512 / parts) / 8) * 4096


def assert_sent(report, tags, sent, dtype, n):
    assert report.status == "proved", report
    assert [row.payload_bytes for row in report.collectives] == sent
    assert [row.tags for row in report.collectives] == [(tag,) for tag in tags]
    for row in report.collectives:
        found = (row.kind, row.origin, row.axes, row.group_size, row.dtype, row.wire_bytes)
        assert found == ("remote-dma", "txcore", ("data",), n, dtype, row.payload_bytes)
    assert all(fate.fates == ("kept",) for fate in report.fates)


def cases():
    if os.environ.get("TXCORE_ALL_TARGETS"):
        return [(t, m, d) for t in TARGETS for m in MESHES for d in DTYPES]
    return list(zip(TARGETS * 2, MESHES * 2, DTYPES, strict=False))


@pytest.mark.parametrize("target, sizes, dtype", cases())
def test_collectives(target, sizes, dtype):
    """Of an odd size, and of twenty times what goes through vector memory at once."""
    n, item = sizes["data"], jnp.dtype(dtype).itemsize
    few = tiles(math.ceil(7 / n), dtype, 2)
    for shard in ((5, 7), (20480, 256)):

        def body(x):
            part = tx.reduce_scatter(x, "data", algorithm="remote_dma", name="part")
            whole = tx.all_gather(part, "data", algorithm="remote_dma", name="whole")
            return tx.psum(whole[:7, 0], "data", algorithm="remote_dma", name="total")

        given = ((n * n * shard[0], shard[1]), dtype, P("data"))
        report = audited(body, target, sizes, given, out_specs=P())
        whole = [math.prod(shard) * item] * 2
        large = whole if shard[1] == 256 else [tiles(35, dtype, 2), tiles(35, dtype, 1)]
        tags = ["reduce_scatter/part", "all_gather/whole", "psum/total", "psum/total"]
        assert_sent(report, tags, [(n - 1) * size for size in (*large, few, few)], dtype, n)


@pytest.mark.parametrize("target, sizes, dtype", [c for c in cases() if c[2] != "int32"])
def test_products_and_their_transposes(target, sizes, dtype):
    n = sizes["data"]

    def loss(x, a, b):
        wide = tx.tensor.column_dense(
            x, a, axis="data", gather_dim=0, overlap=True, algorithm="remote_dma"
        )
        y = tx.tensor.row_dense(
            wide, b, axis="data", scatter_dim=0, overlap=True, algorithm="remote_dma"
        )
        return jnp.sum(y.astype(jnp.float32) ** 2)

    def body(x, a, b):
        return jax.grad(loss, (0, 1, 2))(x, a, b)

    rows, inner, wide = 100, 200, 300
    report = audited(
        body,
        *(target, sizes),
        ((n * rows, inner), dtype, P("data")),
        ((inner, n * wide), dtype, P(None, "data")),
        ((n * wide, inner), dtype, P("data")),
        out_specs=(P("data"), P(None, "data"), P("data")),
    )
    item = jnp.dtype(dtype).itemsize
    padded = {"float32": 104, "bfloat16": 112}[dtype], {"float32": 112, "bfloat16": 128}[dtype]
    gathers, scatters = ((n - 1) * r * 256 * item for r in padded)  # 200 features are padded to 256
    assert report.status == "proved", report
    # The backward pass of one sends what the forward pass of the other does.
    assert sorted((row.tags[0], row.payload_bytes) for row in report.collectives) == sorted(
        (tag, size)
        for tag in ("all_gather_matmul/column", "matmul_reduce_scatter/row")
        for size in (gathers, scatters)
    )


@pytest.mark.parametrize("shard, kernels_of", [(None, 2), ("gradients", 1)])
def test_a_step_by_its_plan(shard, kernels_of):
    """The plan predicts what the exchange of gradients sends: a scatter alone where they stay."""
    report = audit_remote_exchange(shard, "tpu:v5e:2x4")
    assert report.status == "proved", report
    [line] = [line for line in report.plan if line.what == "gradients"]
    sent = kernels_of * 7 * 8192
    assert (line.kind, line.payload_bytes, line.found_bytes) == ("remote-dma", sent, sent)
    assert line.factor == "mean"


def test_the_costs_know_how_long_a_ring_takes():
    """A v5e's links send 45 GB/s each way; a product goes on beside the copies."""
    rows, inner, wide = 1024, 2048, 512

    def build(mesh):
        def body(x, w):
            return kernels.ring_all_gather_matmul(x, w, "data")

        args = shape(mesh, P("data"), 8 * rows, inner), shape(mesh, P(), inner, wide)
        return on(mesh, (P("data"), P()), P("data"))(body), args

    found = costs(build, target=available("tpu:v5e:2x4"), mesh={"data": 8})
    (row,) = found.schedule.overlaps
    sent = 7 * rows * inner * 4
    assert (row.kind, row.wire_bytes, row.note) == ("remote-dma", sent, "")
    link, hops = parse_target("tpu:v5e:2x4").chip.link_bytes_per_second, row.seconds
    assert any(
        hops == pytest.approx(n * sent / (2 * link) + 7 * n * 1e-6, rel=1e-3) for n in (1, 2)
    )
    assert found.schedule.flops == 2 * 8 * rows * inner * wide
    assert 0 < row.exposed_seconds < row.seconds


def test_the_kernels_by_themselves():
    """As anyone's shard_map calls them, without a tag."""
    report = audited(
        lambda x: kernels.ring_all_reduce(x, "data"),
        *("tpu:v5e:2x4", {"data": 8}, ((8, 1000), "float32", P("data"))),
        out_specs=P(),
    )
    assert report.status == "proved", report
    assert [row.origin for row in report.collectives] == ["user", "user"]
