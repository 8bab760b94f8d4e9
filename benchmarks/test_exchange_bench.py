"""Time of a step by how its gradients are exchanged: leaf by leaf, combined, in buckets, flat.

`python benchmarks/exchange_steps.py` prints them side by side in alternating rounds.
"""

import exchange_steps
import jax
import numpy as np
import pytest

import txcore as tx


@pytest.mark.parametrize("kind", exchange_steps.KINDS)
@pytest.mark.parametrize("model", exchange_steps.MODELS.values(), ids=list(exchange_steps.MODELS))
def test_step(benchmark, model, kind):
    mesh = tx.MeshSpec(jax.devices()[: exchange_steps.DEVICES])
    step, params, scale = exchange_steps.make_step(model, kind, mesh)
    held = [params]

    def run():
        held[0] = jax.block_until_ready(step(held[0], scale))

    run()
    first = np.asarray(jax.tree.leaves(held[0])[0])
    np.testing.assert_allclose(first, 0.8, rtol=1e-6)  # 1 - 0.1 * the mean of 1 and 3
    benchmark(run)
    benchmark.extra_info |= {"devices": exchange_steps.DEVICES, "leaves": len(model)}
