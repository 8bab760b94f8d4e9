"""TXCORE_CACHE: what comes from the folder has the same proof as what was compiled."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore.profiling import AutoShardingError, lock, no_auto_collectives

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_compilation_cache_include_metadata_in_key",
    "jax_persistent_cache_min_compile_time_secs",
)
BATCH = np.ones((4, 3), np.float32)


@pytest.fixture
def hits(monkeypatch, tmp_path):
    """A run with TXCORE_CACHE; a function of how many programs have come from it."""
    monkeypatch.setenv("TXCORE_CACHE", str(tmp_path / "made" / "cache"))
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    found = []

    def count(event, **_):
        if event == "/jax/compilation_cache/cache_hits":
            found.append(event)

    monitoring.register_event_listener(count)
    yield lambda: len(found)
    monitoring.unregister_event_listener(count)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def make_step(name):
    @tx.step_fn
    def step(state, batch):
        def loss_of(params):
            return tx.example_mean((batch @ params["w"]) ** 2, axis="data")

        loss, grads = tx.value_and_grad(loss_of)(state.params)
        state = state.apply_gradients(grads=tx.pmean(grads, "data", name=name))
        return state, {"loss": tx.pmean(loss, "data")}

    return step


def make_engine():
    return tx.Engine(
        mesh=tx.MeshSpec(jax.devices()[:2]),
        plan=tx.Plan(data_parallel=tx.DP("data")),
        optimizer=tx.optim.sgd(0.1),
    )


def start(name="grads"):
    """Begin a run from nothing; return its report, and its loss."""
    jax.clear_caches()
    engine, step = make_engine(), make_step(name)
    state = engine.create_state({"w": np.zeros(3, np.float32)})
    report = engine.audit(step, state, BATCH)
    return report, float(engine.run(step, state, BATCH)[1]["loss"])


def test_audit_and_lock_of_a_cached_start_are_those_of_a_compiled_one(hits, tmp_path):
    # From one line, since the lines of all callers are in a program, and in its key.
    runs = [(*start(name), hits()) for name in ("grads", "grads", "named")]
    (compiled, loss, none), (cached, again, some), (renamed, *_) = runs
    assert none == 0
    assert some > 0
    assert str(cached) == str(compiled)
    assert cached.to_dict() == compiled.to_dict()
    assert again == loss
    path = tmp_path / "step.lock.json"
    assert lock.update(path, compiled).ok
    assert lock.check(path, cached, exact=True).ok
    # It computes the same, but says something else: what was cached is not taken for it.
    assert "named" in str(renamed)


def test_a_gate_refuses_a_cached_program_too(hits):
    make_engine()  # turns the cache on
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(jnp.ones(8), NamedSharding(mesh, P("data")))

    def add_up(x):
        return (3 * x).sum()

    for _ in range(2):
        jax.clear_caches()
        assert jax.jit(add_up)(x) == 24
    assert hits() > 0
    jax.clear_caches()
    with pytest.raises(AutoShardingError), no_auto_collectives():
        jax.jit(add_up)(x)


def test_a_folder_that_cannot_be_made_is_refused(monkeypatch, tmp_path):
    file = pathlib.Path(tmp_path / "file")
    file.write_text("")
    monkeypatch.setenv("TXCORE_CACHE", str(file))
    text = r"TXCORE_CACHE needs a folder that can be written, got .*file \(file exists\): name"
    with pytest.raises(ValueError, match=text):
        make_engine()
    monkeypatch.setenv("TXCORE_CACHE", "~nobody-of-this-name/cache")
    text = (
        r"needs a folder that can be written, got ~nobody-of-.*\(could not determine home directory"
    )
    with pytest.raises(ValueError, match=text):
        make_engine()
