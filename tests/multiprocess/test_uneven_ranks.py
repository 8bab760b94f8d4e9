"""Real ranks with fewer examples, or none: nothing dropped, none waits, each mean is exact."""

import json
import pathlib

import jax
import numpy as np
import pytest
import test_ranks_agree as ranks
import uneven_worker as worker
from uneven_worker import toys

import txcore as tx

WORKER = pathlib.Path(worker.__file__)
SIZE = 4
# By rank, the examples in each of its batches.
UNEVEN = {2: [[4, 4, 3], [2]], 4: [[4, 2], [], [4, 4, 1], [3]]}


def run(cases, world, devices=1):
    return ranks.run(cases, world, devices, worker=WORKER)


def global_batches(sizes):
    """Return the real examples of each step, of all ranks."""
    for batch in range(max(map(len, sizes))):
        own = [
            worker.part(r, batch, rows[batch]) for r, rows in enumerate(sizes) if batch < len(rows)
        ]
        whole = {key: np.concatenate([part[key] for part in own]) for key in worker.LIKE}
        yield {**whole, "mask": np.ones(len(whole["y"]), np.float32)}


def in_float64(sizes):
    """Return losses and parameters of two epochs of gradient descent, and the loss of all data."""
    params, losses = toys.params(), []
    for _ in range(2):
        for batch in global_batches(sizes):
            params, loss = toys.reference_step(params, batch)
            losses.append(loss)
    batches = list(global_batches(sizes))
    whole = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    return losses, params, toys.reference_step(params, whole)[1]


@pytest.mark.slow
@pytest.mark.parametrize("world, devices", [(2, 2), pytest.param(4, 1, marks=pytest.mark.extra)])
def test_the_curve_is_that_of_all_examples(world, devices):
    sizes = UNEVEN[world]
    given = {"sizes": sizes, "size": SIZE}
    cases = [["curve", given], ["curve_of_groups", given], ["refused", {}]]
    found = ranks.found(run(cases, world, devices))
    losses, params, evaluation = in_float64(sizes)
    np.testing.assert_allclose(found[0]["curve"]["losses"][: len(losses)], losses, rtol=1e-5)
    assert len(found[0]["curve"]["losses"]) == len(losses) + 1  # and the end of fit
    for row in found:
        assert row["curve_of_groups"] == row["curve"]
        np.testing.assert_allclose(row["curve"]["eval"], evaluation, rtol=1e-5)
        for name in params:
            np.testing.assert_allclose(row["curve"]["params"][name], params[name], rtol=2e-4)
        assert row["refused"] == found[0]["refused"]
    refused = found[0]["refused"]
    assert {case["error"] for case in refused.values()} == {"ValueError"}
    assert "needs the same size= on every rank, got [4, 5" in refused["sizes"]["text"]
    others = "rank 1" if world == 2 else "ranks 1, 2 and 3"
    assert f"got none on {others}: give a batch" in refused["like"]["text"]


def test_one_process_gives_the_same_curve():
    """The global batches of the two ranks, padded by one process, on four devices and on one."""
    sizes = UNEVEN[2]
    losses, params, _ = in_float64(sizes)
    for n in (1, 4):
        told = []
        engine = toys.engine(n, loggers=[lambda record, told=told: told.append(record.metrics)])
        batches = [{key: batch[key] for key in worker.LIKE} for batch in global_batches(sizes)]
        state = engine.fit(
            toys.train_step,
            engine.create_state(toys.params()),
            lambda epoch, batches=batches: tx.even_batches(batches, 2 * SIZE),
            epochs=2,
        )
        got = [metrics["loss"] for metrics in told if metrics]
        np.testing.assert_allclose(got, losses, rtol=1e-5)
        for name in params:
            np.testing.assert_allclose(jax.device_get(state.params[name]), params[name], rtol=2e-4)


@pytest.mark.slow
def test_rows_that_differ_in_one_step_are_named():
    """Without padding: a batch that is shorter on one rank, in a step that both have compiled."""
    ended = run([["unpadded", {"sizes": [[4, 4], [4, 3]]}]], 2)
    text = (
        "rank 1 came to batch 2 of epoch 0, step 2 of fit, 6 rows, where rank 0 came to batch 2 of "
        "epoch 0, step 2 of fit, 8 rows"
    )
    assert any(text in err for _, _, err in ended), json.dumps(ended)
    assert all(code in (1, 70) for code, _, _ in ended)
