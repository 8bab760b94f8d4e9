"""Products that overlap with a collective by remote DMA, on simulated TPUs, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ring_cases import assert_near, found_race, make_rows, mesh_of, run_ring, simulated, wide

from txcore.kernels import ring
from txcore.kernels.ring import neighbours

pytestmark = [pytest.mark.usefixtures("unoptimized"), pytest.mark.sampled(2)]

# Of at most 64 KiB: in jax 0.10 a callback waits until a larger operand is copied, by a thread that
# the callbacks of 8 devices may hold.
CASES = [(2, "float32", 130, 5), (4, "bfloat16", 7, 20), (8, "float32", 7, 3)]


@pytest.mark.parametrize(("devices", "dtype", "inner", "rows"), CASES)
def test_all_gather_matmul(devices, dtype, inner, rows):
    x, w = make_rows(devices, (rows, inner), dtype), make_rows(devices, (inner, 9), dtype, seed=1)
    found = run_ring(
        lambda x, w: ring.ring_all_gather_matmul(x, w, "data", interpret=simulated()),
        *(mesh_of(data=devices), x, w),
    )
    wanted = wide(x).reshape(-1, inner) @ wide(w)
    np.testing.assert_allclose(
        wide(found), wanted, rtol=0, atol=1e-4 if dtype == "float32" else 0.25
    )
    assert found.dtype == jnp.dtype(dtype)
    assert not found_race()


@pytest.mark.parametrize(("devices", "dtype", "inner", "rows"), CASES)
def test_matmul_reduce_scatter(devices, dtype, inner, rows):
    x = make_rows(devices, (devices * rows, inner), dtype)
    w = make_rows(devices, (inner, 9), dtype, seed=1)
    found = run_ring(
        lambda x, w: ring.ring_matmul_reduce_scatter(x, w, "data", interpret=simulated()),
        *(mesh_of(data=devices), x, w),
    )
    wanted = (wide(x) @ wide(w)).sum(0).reshape(devices, rows, 9)
    assert_near(found, wanted, dtype)
    assert not found_race()


def test_without_credit_a_sender_overruns_its_neighbour(monkeypatch):
    monkeypatch.setattr(neighbours, "take_room", lambda credit: None)
    x, w = make_rows(8, (8, 7)), make_rows(8, (7, 9), seed=1)
    run_ring(
        lambda x, w: ring.ring_matmul_reduce_scatter(x, w, "data", interpret=simulated()),
        *(mesh_of(data=8), x, w),
    )
    assert found_race()


@pytest.mark.parametrize(("devices", "check_vma"), [(4, True), (2, False)])
def test_the_transposes_are_each_other(devices, check_vma):
    """Column then row parallel, as a transformer block has them."""
    params = simulated()
    x, a, b = (make_rows(devices, s, seed=i) for i, s in enumerate([(3, 5), (5, 6), (6, 7)]))
    g = make_rows(devices, (3, 7), seed=3)

    def block(x, a, b):
        y = ring.ring_all_gather_matmul(x, a, "data", interpret=params)
        return ring.ring_matmul_reduce_scatter(y, b, "data", interpret=params)

    def gradients(x, a, b, g):
        return jax.vjp(block, x, a, b)[1](g)

    found = run_ring(gradients, mesh_of(data=devices), x, a, b, g, check_vma=check_vma)
    whole, cotangent = wide(x).reshape(-1, 5), wide(g).reshape(-1, 7)
    a, b = wide(a), wide(b)
    before = cotangent @ b.swapaxes(1, 2)
    wanted = (
        (before @ a.swapaxes(1, 2)).sum(0).reshape(x.shape),
        whole.T @ before,
        (whole @ a).swapaxes(1, 2) @ cotangent,
    )
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)
    assert not found_race()


def test_what_does_not_fit_is_refused():
    params = simulated()

    def error_of(error, x, w, function=ring.ring_all_gather_matmul):
        with pytest.raises(error) as said:
            run_ring(
                lambda x, w: function(x, w, "data", interpret=params),
                *(mesh_of(data=2), np.zeros((2, *x[0]), x[1]), np.zeros((2, *w[0]), w[1])),
            )
        return str(said.value)

    assert error_of(TypeError, ((2, 3), np.int32), ((3, 4), np.int32)) == (
        "ring_all_gather_matmul needs x and w of one dtype, float32 or bfloat16, got int32 and "
        "int32: cast them"
    )
    assert error_of(ValueError, ((2, 3), np.float32), ((2, 4), np.float32)) == (
        "ring_all_gather_matmul needs x of shape (rows, in) and w (in, out), none of them 0, got "
        "(2, 3) and (2, 4): reshape them"
    )
    scatter = ring.ring_matmul_reduce_scatter
    assert error_of(ValueError, ((3, 3), np.float32), ((3, 4), np.float32), scatter) == (
        "ring_matmul_reduce_scatter over 'data' needs rows of x divisible by 2, got shape (3, 3): "
        "pad them to 4"
    )
