"""The MNIST step with every kernel on, compiled for 8 H100 and a v5e slice, beside XLA's own."""

import functools
import os
import warnings

import jax
import models
import numpy as np
import pytest
import train
from target_cases import available

import txcore as tx
from txcore.kernels.dispatch import registry
from txcore.kernels.dispatch.back_ends import resolve_pallas
from txcore.profiling.cost.instruction import count_work
from txcore.profiling.hlo import read_modules
from txcore.profiling.hlo.graph import Graph

ALL = os.environ.get("TXCORE_ALL_KERNELS") == "1"
BATCH = 256  # examples on each device
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute")


def choose(back_end, problem, kernels):
    """Take the platform's Pallas kernel wherever there is one, or XLA everywhere."""
    name = resolve_pallas(back_end, problem.platform, kernels)
    known = name in kernels and kernels[name].refuse(problem) is None
    name = name if known else "xla"
    return registry.Choice(name, kernels[name].configs(problem)[0], "given")


def audit_step(back_end, target):
    """Return the report of the `cnn` step on 8 devices of a target, and the compiled module."""
    layers = models.layers_of("cnn")
    engine = tx.Engine(
        mesh=tx.MeshSpec(jax.devices()[:2]),
        plan=tx.Plan(data_parallel=tx.DP("data")),
        optimizer=tx.optim.sgd(0.02, momentum=0.9, clip_norm=1.0),
    )
    batch = {
        "image": np.zeros((BATCH, 28, 28, 1), np.float32),
        "label": np.zeros(BATCH, np.int32),
        "weight": np.ones(BATCH, np.float32),
    }
    with (
        registry.decided_by(functools.partial(choose, back_end)),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        state = engine.create_state(models.init(layers, 0))
        step = train.make_steps(layers)[0]
        report = engine.audit(step, state, batch, target=target, mesh={"data": 8})
    return report, report.program.compiled.as_text()


def count_launches(text):
    """Return the kernels of a compiled step and the bytes of memory that they touch."""
    launches = moved = 0
    for module in read_modules(text):
        graph = Graph(module)
        (entry,) = (c.name for c in module.computations.values() if c.is_entry)
        scope = graph.scope_of(entry)
        for instruction in scope.computation.instructions:
            assert instruction.opcode not in ("while", "conditional")
            if instruction.opcode.startswith(COLLECTIVES) or instruction.opcode.endswith("-done"):
                continue
            size = count_work(instruction, scope, graph).bytes
            launches, moved = launches + bool(size), moved + size
    return launches, moved


# Kernels and megabytes of memory of one step on one device, at most: by XLA alone, with Pallas'.
LIMITS = {
    "cuda:h100:8": ((62, 307), (70, 107)),
    "tpu:v5e:2x4": ((66, 9), (86, 12)),  # most of it stays in a TPU's vector memory
}
PALLAS = {"cuda:h100:8": "pallas_triton", "tpu:v5e:2x4": "mosaic_tpu"}


@pytest.mark.parametrize("target", LIMITS)
def test_the_step_is_proved_and_moves_no_more_than_is_shown(target):
    available(target)
    if not (ALL or target.startswith("cuda")):
        pytest.skip("TXCORE_ALL_KERNELS=1 compiles for this one too")
    (own, own_text), (ours, our_text) = (
        audit_step(back_end, target) for back_end in ("xla", "pallas")
    )
    for report in (own, ours):
        assert report.exact, report
        assert report.status == "proved"
    assert ours.payload_bytes == own.payload_bytes
    assert {use.name.partition(".")[2] for use in own.kernels} == {"xla"}
    used = {use.name: use.calls for use in ours.kernels}
    wanted = {"conv2d": 2, "dense": 2, "cross_entropy": 1, "squared_norm": 8, "sgd_momentum": 8}
    assert {f"{op}.{PALLAS[target]}": calls for op, calls in wanted.items()}.items() <= used.items()
    for text, (launches, megabytes) in zip((own_text, our_text), LIMITS[target], strict=True):
        found, moved = count_launches(text)
        assert (found <= launches, moved <= megabytes * 1e6) == (True, True), (found, moved)


def test_an_instruction_counts_by_what_it_touches():
    text = (
        "HloModule m, is_scheduled=true\n\n"
        "%fused (p: f32[8]) -> f32[8] {\n"
        "  %p = f32[8]{0} parameter(0)\n"
        "  ROOT %n = f32[8]{0} negate(%p)\n"
        "}\n\n"
        "ENTRY %main (a: f32[8]) -> f32[8] {\n"
        "  %a = f32[8]{0} parameter(0)\n"
        "  %f = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused\n"
        "  %b = f32[8]{0} bitcast(%f)\n"
        '  %k = f32[8]{0} custom-call(%b, %a), custom_call_target="__gpu$xla.gpu.triton"\n'
        "  ROOT %r = f32[8]{0} all-reduce(%k), replica_groups={}, to_apply=%fused\n"
        "}\n"
    )
    assert count_launches(text) == (2, 64 + 96)
