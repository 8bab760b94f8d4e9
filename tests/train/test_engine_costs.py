"""`engine.costs`: what the training step costs here and on machines that are not here."""

import jax.numpy as jnp
import numpy as np
import pytest
import toys

from txcore.profiling import costs


@pytest.fixture(scope="module")
def made():
    engine = toys.engine(2)
    return engine, engine.create_state(toys.params())


def test_what_it_sends_is_what_the_audit_says(made):
    engine, state = made
    batch = toys.batch(8)
    here, there = (
        (engine.costs(toys.train_step, state, batch, **where), where)
        for where in ({}, {"target": "cpu:8", "mesh": {"data": 8}})
    )
    for found, where in (here, there):
        report = engine.audit(toys.train_step, state, batch, **where)
        assert found.report.payload_bytes == report.payload_bytes
        # Gradients, the loss, and of a batch with a mask the count: 4 x 8 + 8 + 1 + 1 numbers.
        assert sum(total.payload_bytes for total in found.totals) == 4 * (32 + 8 + 1 + 1)
        assert found.schedule.seconds is None, "nobody named a CPU's peaks"
    assert [total.group_size for total in here[0].totals] == [2]
    assert [total.group_size for total in there[0].totals] == [8]
    # (n - 1) / n x 2 of the payload.
    assert there[0].totals[0].wire_bytes == 2 * 7 * 168 / 8


def test_a_target_needs_a_mesh(made):
    engine, state = made
    text = r"engine\.costs needs target= and mesh= together, .* got target='cpu:8', mesh=None"
    with pytest.raises(TypeError, match=text):
        engine.costs(toys.train_step, state, toys.batch(8), target="cpu:8")


def test_an_argument_that_is_no_array_is_none_of_the_arrays():
    def scale(tree, unused):
        return {"w": 2 * tree["w"], "none": tree["none"]}

    found = costs(scale, {"w": jnp.ones((4, 4)), "none": None}, np.ones(2, np.float32))
    assert found.memory.arguments == 64
