"""Targets: names, refusals, meshes, and what the audit does with them; without any compiler."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore.profiling import AutoShardingError, assert_no_auto_sharding, audit
from txcore.profiling.targets import CHIPS, devices, parse_target
from txcore.profiling.targets.gpu import target_config


@pytest.mark.parametrize(
    "name, shape, size",
    [
        ("tpu:v5p:16x16x16", (16, 16, 16), 4096),
        ("tpu:v4:2x2x4", (2, 2, 4), 16),
        ("tpu:v5e:2x4", (2, 4), 8),
        ("tpu:v6e:16x16", (16, 16), 256),
        ("cuda:h100:8", (1, 8), 8),
        ("cuda:h200:64x8", (64, 8), 512),
        ("cuda:a100:2x4", (2, 4), 8),
        ("cpu:8", (8,), 8),
    ],
)
def test_names(name, shape, size):
    target = parse_target(name)
    assert (target.name, target.shape, target.size) == (name, shape, size)
    assert target.platform == name.split(":")[0]
    assert (target.chip and target.chip.name) == (
        name.split(":")[1] if size and shape != (8,) else None
    )


FORMS = "'tpu:v5p:16x16x16', 'cuda:h100:64x8' (hosts x GPUs) or 'cpu:8'"
BAD = {
    "": f"a target needs to be as {FORMS}, got ''",
    "rocm:mi300:8": f"a target needs to be as {FORMS}, got 'rocm:mi300:8'",
    "gpu:h100:8": f"a target needs to be as {FORMS}, got 'gpu:h100:8'",
    "tpu:v5p": f"a target needs to be as {FORMS}, got 'tpu:v5p'",
    "cpu:8:8": f"a target needs to be as {FORMS}, got 'cpu:8:8'",
    "cuda:b200:8": "a known chip, got 'cuda:b200:8': use one of cuda:a100, cuda:h100, cuda:h200",
    "tpu:h100:8": "got 'tpu:h100:8': use one of tpu:v4, tpu:v5e, tpu:v5p, tpu:v6e",
    "tpu:v5p:16x16": "needs a shape AxBxC of positive numbers, got '16x16'",
    "tpu:v5e:2x2x2": "needs a shape AxB of positive numbers, got '2x2x2'",
    "tpu:v5e:0x4": "needs a shape AxB of positive numbers, got '0x4'",
    "tpu:v5e:2x-4": "needs a shape AxB of positive numbers, got '2x-4'",
    "tpu:v5e:32x16": "a slice of v5e needs at most 256 chips, got 512 in 'tpu:v5e:32x16': use a",
    "cuda:h100:": "needs a shape N of positive numbers, got ''",
    "cuda:h100:2x2x2": "needs a shape AxB of positive numbers, got '2x2x2'",
    "cuda:h100:16": "needs at most 8 GPUs, got 16 in 'cuda:h100:16': write hosts x GPUs, "
    "as cuda:h100:2x8",
    "cpu:two": "needs a shape N of positive numbers, got 'two'",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_names(name):
    with pytest.raises(ValueError) as error:
        parse_target(name)
    assert BAD[name] in str(error.value)


def test_cpu_devices_are_those_of_this_process():
    assert parse_target("cpu:4").devices == tuple(jax.devices()[:4])
    with pytest.raises(RuntimeError, match=r"'cpu:9' needs 9 CPU devices, but this process has 8"):
        parse_target("cpu:9").mesh({"data": 9})


def test_a_mesh():
    mesh = parse_target("cpu:8").mesh({"data": 4, "model": 2})
    assert dict(mesh.shape) == {"data": 4, "model": 2}
    assert mesh.devices.ravel().tolist() == jax.devices()
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    "sizes, given",
    [
        ({"data": 4}, "got data=4 = 4"),
        ({}, "got no axis = 1"),
        ({"a": 8, "b": 0}, "= 0"),
        ({"a": -8, "b": -1}, "a=-8,b=-1"),
    ],
)
def test_a_mesh_that_does_not_fit(sizes, given):
    with pytest.raises(ValueError) as error:
        parse_target("cpu:8").mesh(sizes)
    assert "a mesh on cpu:8 needs axes whose sizes multiply to its 8 devices" in str(error.value)
    assert given in str(error.value)


@pytest.mark.parametrize(
    "name, installed, message",
    [
        ("tpu:v5e:2x4", {}, r"needs the package libtpu, .* pip install 'txcore\[tpu-target\]'"),
        ("tpu:v5e:2x4", {"libtpu": "0.0.1"}, r"beside jax .*, but 0.0.1 is installed: pip install"),
        ("cuda:h100:8", {}, r"needs the packages jax-cuda12-plugin and .*'txcore\[gpu-target\]'"),
        (
            "cuda:h100:8",
            {"jax-cuda13-plugin": "0.1", "jax-cuda13-pjrt": "0.1"},
            r"needs jax-cuda13-plugin and jax-cuda13-pjrt .*, as jaxlib, but found 0.1: pip",
        ),
    ],
)  # fmt: skip
def test_compilers_that_are_missing_or_of_another_version(monkeypatch, name, installed, message):
    monkeypatch.setattr(devices, "_installed_version", installed.get)
    devices.tpu_devices.cache_clear()
    devices.gpu_devices.cache_clear()
    with pytest.raises(ImportError, match=message):
        parse_target(name).mesh({"data": 8})


def test_chips_say_the_same_to_the_compiler_and_to_the_cost_model():
    assert set(CHIPS["cuda"]) == {"a100", "h100", "h200"}
    for name, chip in CHIPS["cuda"].items():
        config = target_config(name)
        assert f"device_memory_size: {chip.hbm_bytes:.0f}" in config
        assert f"memory_bandwidth: {chip.hbm_bytes_per_second:.0f}" in config


@pytest.mark.parametrize("name, tflops", [("a100", 19.5), ("h100", 67), ("h200", 67)])
def test_cores_and_clock_make_the_data_sheet_s_fp32_peak(name, tflops):
    found = dict(re.findall(r"(\w+): ([\d.]+)\n", target_config(name)))
    cores, units, ghz = (float(found[k]) for k in ("core_count", "fpus_per_core", "clock_rate_ghz"))
    assert cores * units * 2 * ghz / 1000 == pytest.approx(tflops, rel=0.01)


def rows(mesh, *shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P("data")))


def explicit(mesh):
    fn = jax.shard_map(
        lambda x: tx.psum(x, "data", name="sum"), mesh=mesh, in_specs=P("data"), out_specs=P()
    )
    return fn, (rows(mesh, 16, 4),)


def automatic(mesh):
    return lambda x: x.sum(0), (rows(mesh, 16, 4),)


def test_an_audit_for_a_target():
    report = audit(explicit, target="cpu:4", mesh={"data": 4})
    assert report.exact
    assert (report.target, report.mesh) == ("cpu:4", (("data", 4),))
    assert [(c.tags, c.group_size, c.payload_bytes) for c in report.collectives] == [
        (("psum/sum",), 4, 4 * 4 * 4)
    ]


def test_a_plain_audit_names_its_devices():
    mesh = parse_target("cpu:2").mesh({"data": 2})
    report = audit(*[explicit(mesh)[0]], *explicit(mesh)[1])
    assert (report.target, report.mesh) == ("cpu:2", (("data", 2),))


def test_the_assertion_takes_a_target():
    assert assert_no_auto_sharding(explicit, target="cpu:4", mesh={"data": 4}).ok
    with pytest.raises(AutoShardingError, match=r"all-reduce over data .*\(partitioner\)"):
        assert_no_auto_sharding(automatic, target="cpu:4", mesh={"data": 4})


def test_a_build_that_makes_its_own_mesh():
    mesh = parse_target("cpu:2").mesh({"data": 2})
    assert audit(lambda: explicit(mesh), target="cpu:2").ok


def test_arguments_that_lie_elsewhere_count_as_shapes():
    def build(mesh):
        fn, _ = explicit(mesh)
        return fn, (jnp.zeros((16, 4)),)

    report = audit(build, target="cpu:4", mesh={"data": 4})
    assert [c.group_size for c in report.collectives] == [4]


MISUSED = {
    "mesh alone": (lambda: audit(jnp.sin, jnp.ones(3), mesh={"data": 2}),
                   TypeError, "audit needs target= with mesh="),
    "arguments": (lambda: audit(explicit, 1, 2, target="cpu:4", mesh={"data": 4}),
                  TypeError, "alone, but got 2 arguments more: return them from build"),
    "no mesh": (lambda: audit(explicit, target="cpu:4"),
                TypeError, 'does not take 0 arguments: give the sizes of its axes, mesh={"data"'),
    "a mesh too many": (lambda: audit(lambda: None, target="cpu:4", mesh={"data": 4}),
                        TypeError, "does not take 1 arguments: leave mesh= out"),
    "no pair": (lambda: audit(lambda mesh: 3, target="cpu:4", mesh={"data": 4}),
                TypeError, "returns (fn, args), but it returned a int"),
    "compiled": (lambda: audit(jax.jit(jnp.sin).lower(1.0).compile(), target="cpu:4"),
                 TypeError, "got target=, mesh= or after_spmd= too: give it the function itself"),
    "not a function": (lambda: audit(3, target="cpu:4"),
                       TypeError, "audit needs a jax function"),
    "no such target": (lambda: audit(explicit, target="cpu", mesh={"data": 4}),
                       ValueError, "a target needs to be as"),
    "a part of it": (lambda: audit(lambda: (jnp.sin, (jnp.ones(3),)), target="cpu:8"),
                     ValueError, "compiled for its devices, got one for cpu:1: give"),
    "no text": (lambda: audit(explicit, target=8, mesh={"data": 8}),
                TypeError, "a target needs to be text as 'tpu:v5p:16x16x16', "),
    "elsewhere": (lambda: audit(lambda: explicit(parse_target("cpu:8").mesh({"data": 8})),
                                target="cpu:4"),
                  ValueError, "compiled for its devices, got one for cpu:8: give its"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISUSED)
def test_misuse(name):
    call, kind, message = MISUSED[name]
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)


def test_a_tpu_machine_keeps_its_own_environment(monkeypatch):
    monkeypatch.setattr(devices, "_has_tpu", lambda: True)
    monkeypatch.setattr(devices, "_check_libtpu", lambda target: None)
    monkeypatch.setattr(devices, "_devices_of_topology", lambda *args, **options: ("device",))
    for name in devices._NO_TPU_HERE:
        monkeypatch.delenv(name, raising=False)
    devices.tpu_devices.cache_clear()
    assert parse_target("tpu:v5e:2x4").devices == ("device",)
    assert not set(devices._NO_TPU_HERE) & set(devices.os.environ)
    devices.tpu_devices.cache_clear()


def test_numpy_arguments():
    fn = jax.jit(lambda x: x + 1)
    mesh = parse_target("cpu:2").mesh({"data": 2})
    here = jax.device_put(np.ones(4, np.float32), NamedSharding(mesh, P("data")))
    assert audit(lambda: (fn, (here,)), target="cpu:2").verdict() == (
        "proved: no collective in the program"
    )
