"""Batches on the mesh: each placed once, what lies there taken as it is, the rest counted right."""

import types

import jax
import numpy as np
import pytest
import toys
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore.launch import watch
from txcore.train.batches import placer
from txcore.train.batches.batch import count_parts
from txcore.train.state import placing


def counted(monkeypatch, module, name):
    calls, inner = [], getattr(module, name)

    def counting(*args):
        calls.append(args)
        return inner(*args)

    monkeypatch.setattr(module, name, counting)
    return calls


@pytest.mark.parametrize("devices", [1, 2])
def test_what_lies_there_is_taken_as_it_is(devices):
    """With one device along the axis the spec is P(None), which lies like P() and P("data")."""
    mesh, plan = toys.mesh(devices), tx.Plan(data_parallel=tx.DP("data"))
    specs = [P("data")] if devices == 2 else [P("data"), P(None), P()]
    for spec in specs:
        batch = jax.device_put(toys.batch(), NamedSharding(mesh.mesh, spec))
        assert placer.shard_batch(batch, mesh, plan) is batch


def test_what_lies_elsewhere_is_moved():
    mesh, plan = toys.mesh(2), tx.Plan(data_parallel=tx.DP("data"))
    batch = jax.device_put(toys.batch(), mesh.sharding())
    placed = placer.shard_batch(batch, mesh, plan)
    assert all(x.sharding.spec == P("data") for x in jax.tree.leaves(placed))
    jax.tree.map(np.testing.assert_array_equal, placed, batch)


def test_a_batch_of_the_host_and_one_of_the_mesh_run_one_program():
    engine = toys.engine(2)
    state, _ = toys.train_step(engine.create_state(toys.params()), toys.batch())
    seconds = engine.compile_seconds
    on_mesh = jax.device_put(toys.batch(), engine.mesh.sharding("data"))
    wide = {key: np.float64(leaf) for key, leaf in toys.batch().items()}  # becomes float32
    for batch in (on_mesh, wide):
        state, _ = toys.train_step(state, batch)
    assert engine.compile_seconds == seconds


def test_fit_places_each_leaf_once_and_walks_the_state_once(monkeypatch):
    placed = counted(monkeypatch, placer, "_place_leaf")
    walked = counted(monkeypatch, placing, "place")
    engine = toys.engine(2)
    engine.fit(toys.train_step, engine.create_state(toys.params()), [toys.batch()] * 5, epochs=1)
    assert len(placed) == 5 * 3
    assert len(walked) == 1  # the first state


def test_padding_is_no_example():
    records = []
    engine = toys.engine(2, loggers=[records.append])
    data = [toys.batch(masked=4), toys.batch(), toys.batch(masked=1)]
    engine.fit(toys.train_step, engine.create_state(toys.params()), data, epochs=1)
    assert [record.examples for record in records] == [12, 28, 43, 43]


def test_a_changed_leaf_of_the_same_dict_is_seen():
    engine = toys.engine(1)
    batch, state = toys.batch(), engine.create_state(toys.params())
    state, _ = toys.train_step(state, batch)
    batch["x"] = batch["x"][:7]
    with pytest.raises(ValueError, match="all leaves of a batch need one row for each example"):
        toys.train_step(state, batch)


def test_options_are_read_only_but_for_the_loggers():
    engine = toys.engine(1)
    engine.loggers = [print]
    assert engine.loggers == (print,)
    with pytest.raises(AttributeError):
        engine.seed = 3
    other = engine.with_optimizer(tx.optim.sgd(0.3))
    assert (other.loggers, other.mesh, other.plan) == ((), engine.mesh, engine.plan)


def test_a_phase_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"watch.at needs phase= one of 'start', 'data', .*'stpe'"):
        watch.at("stpe", 3)
    watch.at("eval step", 3)
    watch.at(watch.Phase.BETWEEN_STEPS)


@pytest.mark.parametrize(
    ("shape", "spec", "places", "parts"),
    [
        ((4, 1), P("data"), [0, 1], 2),  # two processes along the data axis
        ((4, 1), P("data"), [0], 4),
        ((2, 2), P("data"), [0, 2], 1),  # two along the model axis: both have all rows
        ((2, 2), P("data", "model"), [1, 3], 1),
        ((2, 2), P(("data", "model")), [0, 1], 2),
        ((2, 2), P(None, "model"), [0, 2], 1),
        ((2, 2), P(), [0, 2], 1),
    ],
)
def test_processes_that_give_the_same_rows_count_once(shape, spec, places, parts, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    mesh = tx.MeshSpec(jax.devices()[:4], ("data", "model"), shape).mesh
    here = {mesh.devices.flat[place] for place in places}
    sharding = types.SimpleNamespace(mesh=mesh, spec=spec, addressable_devices=here)
    assert count_parts(sharding) == parts
