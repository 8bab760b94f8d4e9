"""The equinox and flax models of examples/ecosystem: on 4 devices as on 1, and audited."""

import importlib
import pathlib

import jax
import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "examples" / "ecosystem"
# Whether the audit is exact: flax reduces statistics by a plain psum, whose transpose has no tag.
EXAMPLES = {
    "equinox_cnn": ("equinox", True),
    "flax_linen_cnn": ("flax", False),
    "flax_nnx_cnn": ("flax", False),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_four_devices_train_as_one_does(name, monkeypatch):
    package, is_exact = EXAMPLES[name]
    pytest.importorskip(package, reason=f"{name}.py needs {package}")
    monkeypatch.syspath_prepend(str(FOLDER))
    example = importlib.import_module(name)
    digits = importlib.import_module("digits")
    ends = []
    for devices in (1, 4):
        state, losses = example.create(devices), []
        engine = state.engine
        for batch in digits.batches(steps=4, size=64):
            state, metrics = example.train_step(state, batch)
            losses.append(metrics["loss"])
        report = engine.audit(example.train_step, state, batch)
        assert report.ok, str(report)
        metrics = engine.evaluate(example.eval_step, state, [digits.test_batch()])
        ends.append(jax.tree.map(np.asarray, (losses, state.stored_params, state.extra, metrics)))
    assert report.exact == is_exact
    assert {row.origin for row in report.collectives} == (
        {"txcore"} if is_exact else {"txcore", "user", "autodiff"}
    )
    assert ends[0][0][-1] < ends[0][0][0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5), *ends)


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_command_is_in_it(name):
    assert f"python examples/ecosystem/{name}.py" in (FOLDER / f"{name}.py").read_text()
