"""Every differentiable op in every implementation that runs here: gradients by differences.

Always those that no other file holds to differences; all of them with TXCORE_ALL_KERNELS=1.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from txcore.kernels.dispatch import registry
from txcore.kernels.tuning.measure import problem_of
from txcore.kernels.tuning.shapes import OPS, Shape

CASES = (
    Shape("conv", "conv2d", ((1, 4, 4, 2), (2, 2, 2, 3), (3,)), {"pool": 2}),
    Shape("dense", "dense", ((5, 6), (6, 3), (3,), (5,)), {"activation": "tanh", "dropout": 0.3}),
    Shape("dropout", "dropout", ((3, 7), (3,)), {"rate": 0.4}),
    Shape("loss", "cross_entropy", ((4, 19), (4,)), {"label_smoothing": 0.1}),
    Shape("linear", "linear_cross_entropy", ((4, 5), (5, 19), (19,), (4,))),
    Shape("pack", "pack", ((3, 2), (5,)), {"scale": 3.0}),
    Shape("unpack", "unpack", ((11,),), {"shapes": ((3, 2), (5,)), "scale": 3.0}),
    Shape("norm", "squared_norm", ((29,),)),
)


def implementations(shape):
    """Return the implementations that run here, without those that only have another name."""
    problem, kernels = problem_of(shape, jnp.float32)
    found = {}
    for name, kernel in kernels.items():
        refused = kernel.refuse(problem) is not None
        if not refused and (problem.platform == "cpu" or registry.is_compiled(problem, name)):
            found.setdefault((kernel.run, type(kernel.configs(problem)[0])), name)
    return list(found.values())


ALL = os.environ.get("TXCORE_ALL_KERNELS") == "1"
ELSEWHERE = ("conv2d", "dense", "cross_entropy", "linear_cross_entropy")
EVERY = [
    pytest.param(shape, name, id=f"{shape.name}-{name}")
    for shape in CASES
    for name in implementations(shape)
    if ALL or shape.op not in ELSEWHERE or name == "mosaic_tpu"
]


def test_no_op_is_left_out():
    assert {shape.op for shape in CASES} == {name for name, op in OPS.items() if not op.updates}


@pytest.mark.parametrize("shape, name", EVERY)
def test_a_gradient_is_what_differences_say(shape, name):
    with jax.enable_x64(True):
        operands = shape.make_operands(jnp.float64)

        def op(*some):
            given = dict(zip(shape.differentiable, some, strict=True))
            values = (given.get(i, x) for i, x in enumerate(operands))
            return shape.call_op(*values, implementation=name)

        differentiated = [operands[i] for i in shape.differentiable]
        check_grads(op, differentiated, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape, name", [case for case in EVERY if case.values[0].op in ("dropout", "squared_norm")]
)
def test_the_error_is_at_most_twice_xla_s(shape, name, dtype):
    # The other ops' are held to it beside their own values.
    operands = shape.make_operands(dtype)
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) if x.dtype == dtype else x for x in operands]
        truth = np.asarray(shape.call_op(*wide, implementation="xla"))

    def error(implementation):
        got = shape.call_op(*operands, implementation=implementation)
        return np.linalg.norm(np.asarray(got, np.float64) - truth)

    assert error(name) <= 2 * error("xla")
