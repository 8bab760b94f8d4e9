"""Compiling for TPUs and GPUs that are not here; needs the extras tpu-target and gpu-target."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from target_cases import available

import txcore as tx
from txcore.profiling import audit
from txcore.profiling.targets import parse_target

TARGETS = {
    "cuda:a100:8": {"data": 8},
    "cuda:h100:8": {"data": 8},
    "cuda:h200:64x8": {"data": 64, "model": 8},
    "tpu:v4:2x2x4": {"data": 16},
    "tpu:v5e:16x16": {"data": 256},
    "tpu:v6e:16x16": {"data": 32, "model": 8},
    "tpu:v5p:16x16x16": {"data": 512, "model": 8},
}


@pytest.fixture(params=TARGETS)
def target(request):
    return available(request.param)


def shape(mesh, dims, *spec):
    return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))


def loss_of(w, x):
    return jnp.mean(jnp.tanh(x @ w["hidden"] + w["bias"]) ** 2)


def arguments(mesh):
    w = {"hidden": shape(mesh, (128, 64)), "bias": shape(mesh, (64,))}
    return w, shape(mesh, (4 * mesh.shape["data"], 128), "data")


def explicit(mesh):
    def step(w, x):
        loss, grads = jax.value_and_grad(loss_of)(tx.vary(w, "data"), x)
        return tx.pmean(grads, "data", name="grads"), tx.pmean(loss, "data", name="loss")

    fn = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    return fn, arguments(mesh)


def test_an_explicit_step_has_its_collectives_and_no_others(target):
    sizes = TARGETS[target]
    report = audit(explicit, target=target, mesh=sizes)
    assert report.exact, report
    assert (report.target, dict(report.mesh)) == (target, sizes)
    sent = 4 * (128 * 64 + 64 + 1)
    n = sizes["data"]
    assert report.payload_bytes == sent
    assert report.wire_bytes == pytest.approx(2 * (n - 1) / n * sent, abs=3)
    assert {(c.kind, c.axes, c.group_size) for c in report.collectives} == {
        ("all-reduce", ("data",), n)
    }
    tags = sorted(tag for c in report.collectives for tag in c.tags)
    assert tags == ["pmean/grads.bias", "pmean/grads.hidden", "pmean/loss"]


def test_an_automatically_sharded_matmul_is_flagged(target):
    def build(mesh):
        n = mesh.shape["data"]
        x = shape(mesh, (8, 2 * n), None, "data")
        return lambda x, w: x @ w, (x, shape(mesh, (2 * n, 16), "data"))

    report = audit(build, target=target, mesh=TARGETS[target])
    assert [(c.kind, c.origin, c.payload_bytes) for c in report.unexplained] == [
        ("all-reduce", "partitioner", 8 * 16 * 4)
    ]


def test_devices_are_those_of_the_target(target):
    found = parse_target(target)
    assert len(set(found.devices)) == found.size
    assert {d.platform for d in found.devices} == {"gpu" if target[0] == "c" else "tpu"}
    assert found.devices is parse_target(target).devices, "they are made once"


def test_the_last_axis_of_gpus_is_a_host():
    mesh = parse_target(available("cuda:h200:64x8")).mesh({"data": 64, "model": 8})
    ids = np.array([[d.id for d in row] for row in mesh.devices])
    assert ids.tolist() == np.arange(512).reshape(64, 8).tolist()


@pytest.mark.parametrize(
    "name, sizes, torus",
    [
        ("tpu:v5p:16x16x16", {"data": 512, "model": 8}, (16, 16, 16)),
        ("tpu:v5e:16x16", {"data": 16, "model": 16}, (16, 16)),
    ],
)
def test_neighbours_along_the_last_axis_of_tpus_are_linked(name, sizes, torus):
    mesh = parse_target(available(name)).mesh(sizes)
    rows = mesh.devices.reshape(-1, mesh.devices.shape[-1])
    for row in rows:
        places = np.array([d.coords[: len(torus)] for d in row])
        apart = np.abs(np.diff(places, axis=0))
        apart = np.minimum(apart, np.array(torus) - apart)
        assert apart.sum(axis=1).tolist() == [1] * (len(row) - 1)


def test_a_shape_that_no_slice_has():
    available("tpu:v5e:2x4")
    with pytest.raises(RuntimeError, match="the compiler for the target 'tpu:v5e:3x3' says: "):
        parse_target("tpu:v5e:3x3").mesh({"data": 9})


SCRIPT = """
import time
from txcore.profiling.targets import parse_target
print(len(parse_target({name!r}).devices), flush=True)
time.sleep(1)
"""


def test_two_processes_compile_for_tpus_at_once_and_quietly():
    run = [sys.executable, "-c", SCRIPT.format(name=available("tpu:v5e:2x4"))]
    started = [
        subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for out, err in [process.communicate(timeout=60) for process in started]:
        assert out == "8\n", err
        # jax up to 0.11 writes of the GPU plugin wherever it is imported beside it.
        lines = [x for x in err.splitlines() if "cudart_stub" not in x and "absl::Init" not in x]
        assert lines == []
