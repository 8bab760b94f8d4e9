"""What a program is compiled with is printed with its proof, and locked with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import txcore as tx
from txcore.profiling import audit, lock

OPTION = "xla_cpu_experimental_ynn_fusion_type"
VALUE = "LIBRARY_FUSION_TYPE_REDUCE"


@tx.step_fn
def step(state, batch):
    def loss_of(params):
        return tx.example_mean((batch @ params["w"]) ** 2, axis="data")

    loss, grads = tx.value_and_grad(loss_of)(state.params)
    state = state.apply_gradients(grads=tx.pmean(grads, "data"))
    return state, {"loss": tx.pmean(loss, "data")}


def report_of(**options):
    engine = tx.Engine(
        mesh=tx.MeshSpec(jax.devices()[:2]),
        plan=tx.Plan(data_parallel=tx.DP("data")),
        optimizer=tx.optim.sgd(0.1),
        **options,
    )
    state = engine.create_state({"w": np.zeros(3, np.float32)})
    return engine.audit(step, state, np.ones((4, 3), np.float32))


def test_the_audit_of_a_step_prints_its_options():
    report = report_of()
    assert report.compiled_with.xla_options == ((OPTION, VALUE),)
    assert f"compiled with XLA's {OPTION}={VALUE!r}" in str(report).splitlines()
    assert report.to_dict()["compiled_with"] == {OPTION: VALUE}
    none = report_of(compiler_options={})
    assert "compiled with" not in str(none)
    assert none.to_dict()["compiled_with"] == {}


@pytest.mark.parametrize(
    ("context", "text"),
    [
        (lambda: jax.default_matmul_precision("highest"), "matmul precision highest"),
        (lambda: jax.default_prng_impl("rbg"), "PRNG rbg"),
        (lambda: jax.enable_x64(True), "64 bits True"),
    ],
)
def test_jaxs_settings_are_those_of_the_compiling_thread(context, text):
    with context():
        report = audit(lambda x: x + 1, jnp.ones(3))
    assert str(report.compiled_with) == text
    assert str(audit(lambda x: x + 2, jnp.ones(3)).compiled_with) == "jax's defaults"


def test_the_lock_says_what_is_compiled_otherwise(tmp_path):
    path = tmp_path / "step.lock.json"
    assert lock.update(path, report_of(compiler_options={})).ok
    plain = path.read_text()
    assert "compiled_with" not in plain
    said = f"compiled with other settings: {OPTION} default -> {VALUE!r}"
    found = lock.check(path, report_of())
    assert found.ok
    assert found.changed
    assert said in str(found).splitlines()
    assert not lock.check(path, report_of(), exact=True).ok
    assert said in str(lock.update(path, report_of())).splitlines()
    assert f'"compiled_with": {{"{OPTION}": "{VALUE}"}}' in path.read_text()
    assert lock.check(path, report_of(), exact=True).ok
    assert not lock.check(path, report_of(compiler_options={}), exact=True).ok
    assert lock.update(path, report_of(compiler_options={})).ok
    assert path.read_text() == plain
