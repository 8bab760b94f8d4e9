"""Time of auditing the compiled MNIST step; compiling it is not in it."""

import pytest
from mnist_step import prepare_step


@pytest.mark.parametrize("model", ["cnn", "cnn3x3"])
def test_audit(benchmark, model):
    engine, step, state, batch = prepare_step(model, devices=2)
    engine.audit(step, state, batch)  # compiles

    report = benchmark(engine.audit, step, state, batch)

    assert report.ok, str(report)
    benchmark.extra_info |= {"collectives": len(report.collectives)}
