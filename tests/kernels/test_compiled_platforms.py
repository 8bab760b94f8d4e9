"""The registry says of each implementation for which platforms it is compiled: so it lowers."""

import itertools
import warnings

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from txcore.kernels.dispatch import registry
from txcore.kernels.tuning.measure import problem_of
from txcore.kernels.tuning.shapes import OPS, SHAPES

ODD = {
    "conv2d": "conv-odd",
    "dense": "dense-odd-drop",
    "dropout": "drop-odd",
    "cross_entropy": "loss-odd",
    "linear_cross_entropy": "linear-loss-odd",
    "pack": "pack-odd",
    "unpack": "unpack-odd",
    "squared_norm": "norm-odd",
    "sgd_momentum": "sgd-odd",
    "adamw": "adamw-odd",
}
DEVICES = {"cpu": "cpu", "gpu": "NVIDIA H100", "tpu": "TPU v5 lite"}
CALLS = {"gpu": "__gpu$xla.gpu.triton", "tpu": "tpu_custom_call", "cpu": "custom_call @"}


def mesh_of(platform):
    device = AbstractDevice(device_kind=DEVICES[platform], num_cores=None, platform=platform)
    return AbstractMesh((1,), ("i",), (AxisType.Auto,), abstract_device=device)


def kernel_calls(shape, choice, platform):
    """Return how many compiled kernels the lowered program of a choice calls."""

    def run(*operands):
        with registry.decided_by(lambda problem, kernels: choice):
            return shape.call_op(*operands)

    lowering = {"gpu": "cuda"}.get(platform, platform)
    with jax.sharding.use_abstract_mesh(mesh_of(platform)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        traced = jax.jit(run).trace(*shape.make_structs())
        return traced.lower(lowering_platforms=(lowering,)).as_text().count(CALLS[platform])


def test_every_op_has_a_shape_here():
    assert set(ODD) == set(OPS)


@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("op", ODD)
def test_what_counts_as_compiled_lowers_to_a_kernel_and_nothing_else_does(op, platform):
    shape = SHAPES[ODD[op]]
    with jax.sharding.use_abstract_mesh(mesh_of(platform)):
        problem, kernels = problem_of(shape, "float32")
    assert problem.platform == platform
    for name in kernels.keys() - {"xla"}:
        compiled = registry.is_compiled(problem, name)
        if kernels[name].refuse(problem) is not None:
            continue
        if not compiled and platform != "cpu":  # it would be interpreted there
            with pytest.raises(NotImplementedError, match="its kernel is compiled for"):
                registry.choose_implementation(problem, kernels, name)
            continue
        choice = registry.Choice(name, kernels[name].configs(problem)[0], "given")
        assert bool(kernel_calls(shape, choice, platform)) == compiled


def test_each_platform_has_a_kernel_of_each_op():
    missing = []
    for platform, op in itertools.product(("gpu", "tpu"), ODD):
        with jax.sharding.use_abstract_mesh(mesh_of(platform)):
            problem, kernels = problem_of(SHAPES[ODD[op]], "float32")
        if len(registry.list_candidates(problem, kernels, ["pallas"])) == 0:
            missing.append((platform, op))
    assert missing == []


@pytest.mark.parametrize("op", ODD)
def test_an_accelerator_refuses_what_it_would_interpret(op):
    shape = SHAPES[ODD[op]]
    with jax.sharding.use_abstract_mesh(mesh_of("tpu")):
        with pytest.raises(NotImplementedError) as error:
            jax.eval_shape(
                lambda *a: shape.call_op(*a, implementation="pallas_triton"),
                *shape.make_structs(),
            )
        jax.eval_shape(shape.call_op, *shape.make_structs())
    reason = (
        "its kernel is compiled for gpu, and on tpu it would be interpreted, which is for "
        "tests on CPU"
    )
    assert str(error.value).startswith(
        f"{op}: implementation='pallas_triton' was asked for, but {reason}: pass 'xla'"
    )
