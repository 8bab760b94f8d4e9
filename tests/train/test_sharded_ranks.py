"""Sharded state over two processes: the run of one device, and beginnings that have to agree."""

import json
import pathlib

import numpy as np
import sharded_models as models
from processes import finish, start_ranks

WORKER = pathlib.Path(__file__).with_name("sharded_rank.py")


def test_two_processes_train_as_one_device(tmp_path):
    ranks = start_ranks(WORKER, tmp_path)
    codes, outputs, errors = zip(*finish(*ranks, deadline_s=300), strict=True)
    assert codes == (0, 0), errors
    first, second = (json.loads(output.splitlines()[-1]) for output in outputs)
    truth = models.Truth(models.params(), clip=0.5)
    start = truth.gradients(models.batch(0))[0]
    for seed in range(3):
        truth.step(models.batch(seed))
    after = truth.gradients(models.batch(0))[0]
    for found in (first, second):
        np.testing.assert_allclose([found[shard] for shard in models.KINDS], after, rtol=1e-5)
        np.testing.assert_allclose(found["sent"], start, rtol=1e-5)
        # No copy of a leaf in parts is left to compare: what each rank was given counts.
        assert "the ranks would begin with different states" in found["refused"]
        assert "state['stored_params']['mlp']['w1'] sha256" in found["refused"]
