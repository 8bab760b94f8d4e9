"""Kernels compiled by the platforms' own compilers: Mosaic for TPU v5e and v6e, XLA's for H100.

`TXCORE_ALL_KERNELS=1` compiles every kernel in both dtypes on each.
"""

import os
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from target_cases import available

from txcore.kernels.tuning.shapes import SHAPES, dense_shape
from txcore.profiling.targets import parse_target

ALL = os.environ.get("TXCORE_ALL_KERNELS") == "1"
# The number of kernels that a TPU runs for the results and the gradients.
ON_TPU = {
    **{"dense-odd-drop": 4, "dense-wide": 4, "drop-odd": 2, "loss-32k-smooth": 2},
    **{"linear-loss-odd": 2, "sgd-odd": 1, "adamw-cnn3x3": 1, "norm-odd": 1},
    # Of MNIST's first layers the images need no gradient.
    **{"cnn-conv1-b256": 2, "cnn-conv2-b256": 3, "cnn3x3-conv1-b256": 2, "cnn3x3-conv2-b256": 3},
    # The gradient of an unpacked buffer is packed.
    **{"conv-odd": 3, "pack-odd": 1, "unpack-odd": 2, "unpack-cnn3x3": 2},
}
ON_GPU = {"dense-odd-drop": 4, "conv-odd": 3, "linear-loss-odd": 2, "loss-odd": 2}
ON_EACH = [("tpu:v5e:2x2", "float32"), ("tpu:v6e:2x2", "bfloat16")]
if ALL:
    ON_EACH += [("tpu:v5e:2x2", "bfloat16"), ("tpu:v6e:2x2", "float32")]


def compile_for(target, shape, dtype, implementation="pallas", **options):
    """Compile a shape's results and gradients by the target's kernels; return the HLO."""
    machine = parse_target(available(target))
    mesh = Mesh(np.array(machine.devices[:1]), ("i",), axis_types=(AxisType.Auto,))

    def run(*operands):
        def forward(*some):
            given = dict(zip(shape.differentiable, some, strict=True))
            values = (given.get(i, x) for i, x in enumerate(operands))
            return shape.call_op(*values, implementation=implementation)

        if not shape.differentiable:
            return forward()
        out, transpose = jax.vjp(forward, *(operands[i] for i in shape.differentiable))
        return out, transpose(jax.tree.map(jnp.ones_like, out))

    arguments = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P()))
        for x in shape.make_structs(dtype)
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        lowered = jax.jit(run).lower(*arguments)
    options = {**machine.compiler_options, **options}
    return lowered.compile(compiler_options=options).as_text()


@pytest.mark.parametrize("target, dtype", ON_EACH)
@pytest.mark.parametrize("name", ON_TPU)
def test_mosaic_compiles_it(name, target, dtype):
    hlo = compile_for(target, SHAPES[name], dtype)
    assert hlo.count('custom_call_target="tpu_custom_call"') == ON_TPU[name]


@pytest.mark.parametrize("name", ON_GPU)
def test_xla_compiles_it_for_an_h100_without_spilling(name):
    options = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}
    hlo = compile_for("cuda:h100:1", SHAPES[name], "bfloat16", **options)
    assert hlo.count('custom_call_target="__gpu$xla.gpu.triton"') == ON_GPU[name]


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax 0.10 has another language")
def test_mosaic_compiles_the_dense_layer_for_an_h100():
    shape = dense_shape("dense-relu", (200, 320), 192, activation="relu")
    hlo = compile_for("cuda:h100:1", shape, "bfloat16", implementation="mosaic_gpu")
    assert len(re.findall(r'custom_call_target="mosaic_gpu\w*"', hlo)) == 1
