"""Which implementation runs: what was named, else what is known to be fast; and where."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import machine
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from txcore import kernels
from txcore.kernels.dispatch import registry
from txcore.kernels.dispatch.problem import Problem

CPU = ("cpu", "cpu")
HERE = jax.devices()[0].platform, jax.devices()[0].device_kind
SMALL = jax.ShapeDtypeStruct((60, 3), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Blocks:
    rows: int = 8


def refuse_odd(problem):
    odd = problem.shapes[0][0] % 2
    return f"its blocks need an even number of rows, given {problem.shapes[0][0]}" if odd else None


def doubled(x, *, config, times=2):
    return times * x


def in_blocks(x, *, config, times=2):
    return times * x + 0 * config.rows


KERNELS: registry.Kernels = {
    "xla": registry.Kernel(doubled),
    "pallas_triton": registry.Kernel(in_blocks, lambda problem: (Blocks(), Blocks(16)), refuse_odd),
}


def problem(rows=60, **options):
    x = jax.ShapeDtypeStruct((rows, 3), jnp.float32)
    return Problem.from_call("double", CPU, (x,), options)


class TestChoice:
    def test_nothing_named_and_nothing_known(self):
        assert registry.choose_implementation(problem(), KERNELS, None) == registry.Choice(
            "xla", None, "heuristic"
        )

    def test_a_name_takes_its_first_configuration(self):
        chosen = registry.choose_implementation(problem(), KERNELS, "pallas")
        assert chosen == registry.Choice("pallas_triton", Blocks(8), "given")

    def test_a_configuration(self):
        chosen = registry.choose_implementation(problem(), KERNELS, "pallas", Blocks(4))
        assert chosen == registry.Choice("pallas_triton", Blocks(4), "given")

    def test_a_name_that_is_not_the_best_is_taken(self):
        assert registry.choose_implementation(problem(), KERNELS, "xla").implementation == "xla"


REFUSED = {
    "no such name": (
        ValueError,
        (problem(), "cuda", None),
        "double: implementation needs to be None or one of 'xla', 'pallas', 'pallas_triton', "
        "'mosaic_gpu', 'mosaic_tpu', 'triton_ir', 'jax_triton', got 'cuda': pass 'xla' or "
        "'pallas_triton', or leave implementation out to have one chosen",
    ),
    "none of that name here": (
        NotImplementedError,
        (problem(), "triton_ir", None),
        "double: implementation='triton_ir' was asked for, but double has no triton_ir kernel: "
        "pass 'xla' or 'pallas_triton', or leave implementation out to have one chosen",
    ),
    "cannot run this": (
        NotImplementedError,
        (problem(7), "pallas", None),
        "double: implementation='pallas' was asked for, but its blocks need an even number of "
        "rows, given 7: pass 'xla', or leave implementation out to have one chosen",
    ),
    "a configuration alone": (
        ValueError,
        (problem(), None, Blocks(4)),
        "double: config= needs implementation= with it, got Blocks(rows=4) alone: name the "
        "implementation that it configures",
    ),
    "a configuration of another": (
        TypeError,
        (problem(), "pallas", {"rows": 4}),
        f"double: implementation='pallas' needs config= a {__name__}.Blocks, got dict: leave "
        "config out for the best guess",
    ),
    "a configuration of none": (
        TypeError,
        (problem(), "xla", Blocks()),
        f"double: implementation='xla' needs no config, got {__name__}.Blocks: leave "
        "config out for the best guess",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_with_the_reason(name):
    error, (what, implementation, config), text = REFUSED[name]
    with pytest.raises(error) as raised:
        registry.choose_implementation(what, KERNELS, implementation, config)
    assert str(raised.value) == text


def test_run_hands_on_operands_options_and_configuration():
    x = jnp.arange(6.0).reshape(2, 3)
    for name in (None, "xla", "pallas"):
        out = registry.run_op("double", KERNELS, x, implementation=name, times=3)
        np.testing.assert_array_equal(out, 3 * x)
    with pytest.raises(NotImplementedError, match="an even number of rows, given 1"):
        registry.run_op("double", KERNELS, x[:1], implementation="pallas")


def test_an_unknown_name_is_refused_by_a_public_op():
    text = (
        "dense: implementation needs to be None or one of 'xla', 'pallas', 'pallas_triton', "
        "'mosaic_gpu', 'mosaic_tpu', 'triton_ir', 'jax_triton', got 'fast': pass 'xla' or "
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        kernels.dense(jnp.ones((2, 2)), jnp.ones((2, 2)), jnp.ones(2), implementation="fast")


TWO_OF_PALLAS: registry.Kernels = {
    "xla": registry.Kernel(doubled),
    "pallas_triton": registry.Kernel(doubled),
    "mosaic_tpu": registry.Kernel(in_blocks, lambda problem: (Blocks(),)),
}


class TestPallas:
    """ "pallas" is the platform's own Pallas back end."""

    @pytest.mark.parametrize(
        "platform, back_end",
        [("gpu", "pallas_triton"), ("tpu", "mosaic_tpu"), ("cpu", "pallas_triton")],
    )
    def test_it_is_the_platform_s(self, platform, back_end):
        what = Problem.from_call("double", (platform, "kind"), (SMALL,), {})
        assert (
            registry.choose_implementation(what, TWO_OF_PALLAS, "pallas").implementation == back_end
        )
        named = registry.list_candidates(what, TWO_OF_PALLAS, ["pallas"])
        assert [choice.implementation for choice in named] == [back_end]

    def test_the_program_shows_which_one_it_is(self):
        def run(x):
            return registry.run_op("double", TWO_OF_PALLAS, x, implementation="pallas")

        text = jax.jit(run).lower(jnp.ones(3)).as_text(debug_info=True)
        assert "kernel.double.pallas_triton" in text

    def test_a_platform_without_one_says_what_it_has(self):
        what = Problem.from_call("double", ("tpu", "TPU v5 lite"), (SMALL,), {})
        text = (
            "double: implementation='pallas' was asked for, but double has no Pallas kernel for "
            "tpu: pass 'xla', or leave implementation out to have one chosen"
        )
        with pytest.raises(NotImplementedError) as raised:
            registry.choose_implementation(what, KERNELS, "pallas")
        assert str(raised.value) == text

    def test_another_platform_s_is_refused(self):
        what = Problem.from_call("double", ("gpu", "NVIDIA H200"), (SMALL,), {})
        text = (
            "double: implementation='mosaic_tpu' was asked for, but its kernel is compiled for "
            "tpu, and on gpu it would be interpreted, which is for tests on CPU: pass 'xla' or "
            "'pallas_triton', or leave implementation out to have one chosen"
        )
        with pytest.raises(NotImplementedError) as raised:
            registry.choose_implementation(what, TWO_OF_PALLAS, "mosaic_tpu")
        assert str(raised.value) == text

    def test_every_command_offers_every_name(self):
        from txcore.cli.tune import _IMPLEMENTATIONS
        from txcore.kernels.dispatch.back_ends import NAMES

        assert _IMPLEMENTATIONS == NAMES


class TestDevice:
    def test_by_default_the_first_one(self):
        assert registry.current_device() == HERE

    @pytest.mark.parametrize(
        "kind, platform",
        [("NVIDIA H200", "gpu"), ("TPU v5 lite", "tpu"), ("cpu", "cpu"), ("AMD MI300X", "gpu")],
    )
    def test_a_mesh_of_absent_devices_decides(self, kind, platform):
        absent = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
        mesh = AbstractMesh((4,), ("data",), (AxisType.Auto,), abstract_device=absent)
        with jax.sharding.use_abstract_mesh(mesh):
            assert registry.current_device() == (platform, kind)
        assert registry.current_device() == HERE

    def test_the_mesh_of_a_shard_map_decides(self, monkeypatch):
        seen = []
        mesh = machine.mesh(data=2)
        monkeypatch.setattr(jax, "devices", None)  # the default device, which is not asked for

        def note(x):
            seen.append(registry.current_device())
            return x

        jax.jit(jax.shard_map(note, mesh=mesh, in_specs=P("data"), out_specs=P("data"))).lower(
            jnp.ones(4)
        )
        assert seen == [HERE]

    @pytest.mark.parametrize("device", ["cpu", jax.local_devices(backend="cpu")[-1]])
    def test_a_default_device_decides(self, device):
        with jax.default_device(device):
            assert registry.current_device() == CPU

    def test_what_a_kernel_is_asked_about_is_the_mesh_s_device(self):
        asked = []

        def refuse(problem):
            asked.append((problem.platform, problem.device))
            return "it is for no machine"

        only = {
            "xla": registry.Kernel(doubled),
            "pallas_triton": registry.Kernel(in_blocks, refuse=refuse),
        }
        absent = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
        mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=absent)
        with (
            jax.sharding.use_abstract_mesh(mesh),
            pytest.raises(NotImplementedError, match=r"but it is for no machine: pass 'xla'"),
        ):
            registry.run_op("double", only, jnp.ones(3), implementation="pallas")
        assert set(asked) == {("gpu", "NVIDIA H200")}


class TestProblem:
    def test_a_class_is_the_batch_rounded_up_to_a_power_of_two(self):
        keys = {rows: problem(rows).key for rows in (32, 33, 60, 64, 65)}
        assert keys[33] == keys[60] == keys[64]
        assert len({keys[32], keys[64], keys[65]}) == 3
        assert keys[64] == "double|cpu|float32|64x3|"

    def test_weights_keep_their_dims(self):
        shapes = ((60, 28, 28, 1), (3, 3, 1, 33), (33,), (60,))
        operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        what = Problem.from_call("op", CPU, operands, {})
        assert what.shape_class == ((64, 28, 28, 1), (3, 3, 1, 33), (33,), (64,))

    def test_options_and_scalars_are_part_of_it(self):
        operands = (SMALL, jax.ShapeDtypeStruct((), jnp.int32))
        what = Problem.from_call(
            "op", ("gpu", "NVIDIA H200"), operands, {"pool": 2, "activation": None}
        )
        assert what.key == "op|NVIDIA H200|float32,int32|64x3,scalar|activation=None,pool=2"
        assert what.get_option("pool") == 2

    def test_of_a_float_only_whether_it_is_zero_counts(self):
        keys = [problem(rate=rate).key for rate in (0.0, 0.25, 0.5)]
        assert keys == [f"double|cpu|float32|64x3|rate={text}" for text in ("0.0", "some", "some")]
