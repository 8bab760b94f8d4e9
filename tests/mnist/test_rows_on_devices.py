"""The set on the devices: batches that name rows give a step what whole batches do."""

import types

import jax
import models
import numpy as np
import pytest
import train
from data.dataset import Dataset
from data.feed import Feed, fits_on, take_rows

import txcore as tx

LAYERS = models.layers_of("mlp")
MASKED = 20 + 1  # examples in batches of 8, of which the last is not full


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)

    def draw(count):
        images = rng.standard_normal((count, 28, 28, 1), np.float32)
        return images, rng.integers(0, 10, count).astype(np.int32)

    return Dataset("random", *draw(MASKED), *draw(1030))


def make_engine(feed, *, held, devices=2):
    mesh = tx.MeshSpec(jax.devices()[:devices])
    whole = feed.hold_on(mesh) if held else {}
    assert bool(whole) == held
    return tx.Engine(
        mesh=mesh,
        plan=tx.Plan(data_parallel=tx.DP("data"), batch=whole),
        optimizer=tx.optim.sgd(0.1, momentum=0.9),
    )


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("train_size", [None, MASKED - 2])
def test_rows_are_the_examples_of_whole_batches(dataset, process, train_size):
    feeds = [Feed(dataset, 8, (2, process, 2), seed=3, train_size=train_size) for _ in range(2)]
    feeds[1].hold_on(tx.MeshSpec(jax.devices()[:1]))
    for read in (lambda f: f.train(0), lambda f: f.train(5), lambda f: f.test()):
        host, held = (list(read(feed)) for feed in feeds)
        assert len(host) == len(held)
        for want, rows in zip(host, held, strict=True):
            got = take_rows(rows)
            assert got.keys() == want.keys()
            for name, leaf in want.items():
                np.testing.assert_array_equal(got[name], leaf)
                assert got[name].dtype == leaf.dtype


def test_a_run_that_goes_on_with_the_set_on_devices_makes_the_same_steps(dataset, tmp_path):
    train_step, eval_step = train.make_steps(LAYERS)
    curves, accuracies, reports = {}, {}, {}
    for name, forms in {
        "host": (False, False),
        "held": (True, True),
        "both": (False, True),
    }.items():
        records = []
        for held, steps in zip(forms, (4, 7), strict=True):  # an epoch has three
            feed = Feed(dataset, 8, (2, 0, 1), seed=1)
            engine = make_engine(feed, held=held)
            engine.loggers = [records.append]
            state = engine.fit(
                train_step,
                engine.create_state(models.init(LAYERS, 0)),
                feed.train,
                steps=steps,
                checkpoints=tx.Checkpoints(tmp_path / name, every=100),
            )
        curves[name] = [r.metrics["loss"] for r in records if r.kind == "step"]
        accuracies[name] = engine.evaluate(eval_step, state, feed.test())
        reports[name] = engine.audit(train_step, state, next(iter(feed.train(0))))
    assert len(curves["host"]) == 7
    np.testing.assert_allclose(curves["held"], curves["host"], rtol=1e-6)
    np.testing.assert_allclose(curves["both"], curves["host"], rtol=1e-6)
    assert accuracies["held"] == accuracies["both"] == accuracies["host"]
    for name in ("held", "both"):  # nothing was added
        assert reports[name].exact
        assert reports[name].ok
        sent = [(c.kind, c.axes, c.payload_bytes) for c in reports[name].collectives]
        assert sent == [(c.kind, c.axes, c.payload_bytes) for c in reports["host"].collectives]


@pytest.mark.parametrize(
    ("limits", "processes", "fits"),
    [
        ([None] * 8, [0] * 8, True),
        ([None] * 9, [0] * 9, False),  # copies in one memory, 128 MiB each
        ([None] * 16, [0, 1] * 8, True),
        ([None] * 10, [0] + [1] * 9, False),  # not here alone: all ranks decide alike
        ([1 << 30, 1 << 30], [0, 0], True),
        ([1 << 30, (1 << 30) - 8], [0, 0], False),
    ],
)
def test_the_set_is_held_where_it_fits(limits, processes, fits):
    array = types.SimpleNamespace(nbytes=1 << 26)
    stats = [None if limit is None else {"bytes_limit": limit} for limit in limits]
    devices = [
        types.SimpleNamespace(memory_stats=lambda own=own: own, process_index=process)
        for own, process in zip(stats, processes, strict=True)
    ]
    assert fits_on(devices, [array, array]) is fits


def test_a_set_that_does_not_fit_stays_on_the_host(dataset, monkeypatch):
    monkeypatch.setattr("data.feed._HOST_BYTES", 0)
    feed = Feed(dataset, 8, (2, 0, 1), seed=0)
    assert feed.hold_on(tx.MeshSpec(jax.devices()[:2])) == {}
    assert "image" in next(iter(feed.train(0)))
