"""Every combination of options that `DP` accepts, on machines that are not here.

Each step's audit is exact, and what it sends is what the plan predicts. Always on are some of each
kind; TXCORE_ALL_PLANS=1 compiles all of them for all targets (90 minutes of CPU).
"""

import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from target_cases import available

import txcore as tx
from txcore.parallel.gradients.algorithms import ALGORITHMS

ALL = os.environ.get("TXCORE_ALL_PLANS") == "1"
AXES = ("node", "device")
TARGETS = {"cpu:8": (2, 4), "cuda:h100:8x8": (8, 8), "tpu:v5e:16x16": (16, 16)}
SIZES = {"b1": (256,), "b2": (3,), "w1": (6, 256), "w2": (256, 3)}
BUCKETS = tx.Buckets(mb=4 / 1024, first_mb=1 / 1024)  # w2 | w1 | b2 b1
INT8 = tx.compression.int8(feedback=False)
KEEPING = ["int8", tx.compression.powersgd(1), tx.compression.powersgd(1, start=2)]
KEEPING += [tx.compression.top_k(0.05)]
HOW = [{"algorithm": name} for name in (None, *ALGORITHMS)]
HOW += [{"compression": one} for one in ("bf16", "fp16", INT8, *KEEPING)]
SHARDS = [{"shard": None}]
SHARDS += [
    {"shard": shard, "shard_axis": axis}
    for shard, axis in itertools.product(["optimizer", "gradients"], [None, "device"])
]
SHARDS += [
    {"shard": "parameters", "shard_axis": axis, "reshard_after_forward": again}
    for axis, again in itertools.product([None, "device"], [True, False])
]
OUTER = tx.optim.sgd(0.7, momentum=0.9, nesterov=True)
OTHERS = [{"reduction": "adasum"}, {"reduction": "adasum", "delay": 1}]
OTHERS += [{"sync_every": 4}, {"sync_every": 4, "outer": OUTER}]


def accepted():
    """Return the options of every plan that is not refused, each with microbatches or without."""
    products = itertools.product(SHARDS, [None, BUCKETS], HOW, [0, 1])
    given = [
        {**shard, "buckets": buckets, **how, "delay": delay}
        for shard, buckets, how, delay in products
    ]
    found = [options for options in given + OTHERS if is_accepted(options)]
    return list(itertools.product(found, [None, 2]))


def is_accepted(options):
    try:
        tx.DP(AXES, **options)
    except ValueError:
        return False
    return True


CASES = accepted()
# One in so many of them is always on. Each takes 2 s of CPU; an all-to-all over 256 v5e 11 s
# more: libtpu compiles it in the cube of the devices (64: 0.3 s), under all options tried.
EVERY = {"cpu:8": 127, "cuda:h100:8x8": 181, "tpu:v5e:16x16": 541}
SAMPLE = [
    (target, *case)
    for i, (target, every) in enumerate(EVERY.items())
    for case in CASES[7 * i :: every]
]
# What is left to average of b2 is as large as what is scattered of b1 over fewer axes.
ALIKE = {"shard": "parameters", "shard_axis": "device", "compression": "bf16"}
SAMPLE.append(("tpu:v5e:16x16", ALIKE, 2))
FULL = [(target, *case) for target in TARGETS for case in CASES]


def step_of(microbatches):
    def loss_of(params, batch):
        hidden = jnp.tanh(batch["x"] @ params["w1"] + params["b1"])
        out = hidden @ params["w2"] + params["b2"]
        return tx.example_mean(jnp.sum((out - batch["y"]) ** 2, -1), axis=AXES)

    @tx.step_fn
    def step(state, batch):
        both = tx.value_and_grad(loss_of, microbatches=microbatches)
        loss, grads = both(state.params, batch)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, AXES, name="loss")}

    return step


STEPS = {microbatches: step_of(microbatches) for microbatches in (None, 2)}


def differences(target, options, microbatches):
    """Return what is not exact or not as predicted, in words; nothing of a plan that holds."""
    engine = tx.Engine(
        mesh=tx.MeshSpec(jax.devices()[:1], AXES, (1, 1)),
        plan=tx.Plan(data_parallel=tx.DP(AXES, **options)),
        optimizer=tx.optim.adamw(0.1, clip_norm=None if "sync_every" in options else 1.0),
    )
    state = engine.create_state({name: np.zeros(s, np.float32) for name, s in SIZES.items()})
    batch = {"x": np.zeros((4, 6), np.float32), "y": np.zeros((4, 3), np.float32)}
    report = engine.audit(
        STEPS[microbatches],
        state,
        batch,
        target=target,
        mesh=dict(zip(AXES, TARGETS[target], strict=True)),
    )
    wrong = [] if report.exact else [str(report)]
    for line in report.plan:
        if not line.payload_bytes or line.what == "parameters again":  # the plan knows at most
            is_right = line.found_bytes <= line.payload_bytes or not line.payload_bytes
        else:
            is_right = line.found_bytes == line.payload_bytes
        if not is_right or (line.what == "gradients" and line.factor != "mean"):
            wrong.append(str(line))
    return wrong


@pytest.mark.parametrize("target, options, microbatches", FULL if ALL else SAMPLE)
def test_exact_and_as_predicted(target, options, microbatches):
    assert differences(available(target), options, microbatches) == []


def test_a_program_for_tpus_is_compiled_once(monkeypatch):
    """Its audit needs the module right after SPMD partitioning too: one compilation keeps both."""
    compiled, real = [], jax.stages.Lowered.compile

    def compile_and_count(lowered, *args, **options):
        compiled.append(options)
        return real(lowered, *args, **options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_and_count)
    options = {"algorithm": "hierarchical"}
    assert differences(available("tpu:v5e:16x16"), options, None) == []
    assert len(compiled) == 1


def test_all_that_go_together_are_here():
    """So many that an option which is accepted or refused anew is seen."""
    assert len(CASES) == 544
