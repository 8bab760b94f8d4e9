"""What the gate adds to compiling the MNIST step, by alternating runs without and with it."""

import contextlib
import statistics

import pytest
from mnist_step import prepare_step

from txcore.profiling import no_auto_collectives

PAIRS = 7  # two compilations each, of some seconds
MOST = 0.05


def compile_seconds(model, gate):
    """Return what tracing, lowering and compiling a new engine's step takes."""
    engine, step, state, batch = prepare_step(model, devices=2)
    with gate:
        engine.run(step, state, batch)
    return engine.compile_seconds


@pytest.mark.parametrize("model", ["cnn", "cnn3x3"])
def test_gate(benchmark, model):
    plain, gated = [], []

    def pair():
        plain.append(compile_seconds(model, contextlib.nullcontext()))
        gated.append(compile_seconds(model, no_auto_collectives()))

    benchmark.pedantic(pair, rounds=PAIRS, warmup_rounds=1)

    if benchmark.stats is not None:  # timed, not only tried
        before, after = (statistics.median(spent[1:]) for spent in (plain, gated))
        added = after / before - 1
        benchmark.extra_info |= {"plain_s": before, "gated_s": after, "added": added}
        assert added < MOST, f"the gate adds {added:.1%} to {before:.3f} s"
