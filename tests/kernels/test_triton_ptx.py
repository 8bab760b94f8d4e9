"""Every GPU kernel to PTX and machine code for sm_80 and sm_90, by the package triton.

`make test-triton` runs this file. The kernels are those of Pallas' Triton lowering and those in
Triton's intermediate representation, forward and backward, as XLA is handed them.
"""

import os
import warnings

import jax
import jax.numpy as jnp
import pytest
from triton_cases import (
    GPUS,
    REGISTERS,
    SHARED_MEMORY,
    assemble,
    compile_ir,
    lower_module,
    read_kernels,
)

from txcore.kernels.dispatch import registry
from txcore.kernels.tuning.shapes import OPS, SHAPES

pytest.importorskip("triton", reason="`make test-triton` installs it")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="it compiles: unset TRITON_INTERPRET"
)

# Name -> (shape, number of its configuration, products of matrices among its kernels).
CASES = {
    "dense": ("cnn-dense-b64", 0, 3),
    "dense with dropout": ("dense-odd-drop", 2, 3),
    "first convolution": ("cnn-conv1-b64", 0, 1),  # the images' gradient, which XLA drops
    "second convolution": ("cnn-conv2-b64", 0, 3),
    "odd convolution": ("conv-odd", 1, 1),
    "dropout": ("drop-odd", 0, 0),
    "loss": ("loss-32k-smooth", 0, 0),
    "loss of a linear layer": ("linear-loss-32k", 0, 2),
    "norm": ("norm-odd", 0, 0),
    "sgd": ("sgd-odd", 0, 0),
    "adamw": ("adamw-odd", 0, 0),
    "pack": ("pack-cnn3x3", 0, 0),
    "unpack": ("unpack-cnn3x3", 0, 0),
}


def kernels_of(shape, number, dtype):
    """Return (IR, warps, stages) of each kernel in a shape's program with gradients."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        module = lower_module(program(shape, number, dtype), *shape.make_structs(dtype))
    return read_kernels(module)


def program(shape, number, dtype):
    name = "triton_ir" if shape.op in ("pack", "unpack") else "pallas_triton"

    def choose(problem, kernels):
        if problem.op != shape.op:
            return None
        return registry.Choice(name, kernels[name].configs(problem)[number], "given")

    def run(*operands):
        def forward(*some):
            given = dict(zip(shape.differentiable, some, strict=True))
            return shape.call_op(*(given.get(i, x) for i, x in enumerate(operands)))

        with registry.decided_by(choose):
            if not shape.differentiable:
                return forward()
            out, transpose = jax.vjp(forward, *(operands[i] for i in shape.differentiable))
            return out, transpose(jax.tree.map(jnp.ones_like, out))

    return run


def test_every_op_has_a_case():
    assert {SHAPES[name].op for name, *_ in CASES.values()} == set(OPS)


@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_fits_and_multiplies_on_tensor_cores(case, arch, tmp_path):
    name, number, products = CASES[case]
    found = kernels_of(SHAPES[name], number, jnp.bfloat16)
    assert sum("tt.dot" in code for code, *_ in found) == products
    for code, warps, stages in found:
        ptx, shared = compile_ir(code, warps, stages, arch, tmp_path)
        assert f".target sm_{arch}" in ptx
        tensor_cores = "mma.sync" in ptx or "wgmma.mma_async" in ptx
        assert tensor_cores == ("tt.dot" in code)
        registers, spilled = assemble(ptx, tmp_path)
        assert registers * 32 * warps <= REGISTERS
        assert shared <= SHARED_MEMORY[arch]
        assert spilled == 0
