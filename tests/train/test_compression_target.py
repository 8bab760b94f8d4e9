"""What compressed gradients put on the wire, on machines that are not here."""

import jax
import numpy as np
import pytest
from target_cases import available

import txcore as tx

N, SIZE, BLOCKS = 8, 256 * 128 + 128, 17  # a device's share of SIZE is 4112 elements
COUNT = 329  # 1% of SIZE
ONCE, TWICE = (N - 1) / N, 2 * (N - 1) / N  # of S: all-to-all and all-gather, all-reduce
CASES = {
    "bf16": ("bf16", "uint16", TWICE * 2 * SIZE),
    "fp16": ("fp16", "uint16", TWICE * 2 * (SIZE + N * BLOCKS)),
    "int8": ("int8", "int8", TWICE * (SIZE + 4 * N * BLOCKS)),
    "powersgd": (
        tx.compression.powersgd(2),
        "float32",
        TWICE * 4 * (2 * (256 + 128) + 128),
    ),
    "top-k": (tx.compression.top_k(0.01), None, ONCE * N * COUNT * (4 + 4)),
}
PLAIN = TWICE * 4 * SIZE


def loss_of(params, batch):
    return tx.example_mean(((batch @ params["w"] + params["b"]) ** 2).sum(-1), axis="data")


@tx.step_fn
def train_step(state, batch):
    loss, grads = tx.value_and_grad(loss_of)(state.params, batch)
    grads, state = state.sync_gradients(grads)
    return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data", name="loss")}


def audit(target, compression, **options):
    engine = tx.Engine(
        mesh=tx.MeshSpec(jax.devices()[:1]),
        plan=tx.Plan(data_parallel=tx.DP("data", compression=compression, **options)),
        optimizer=tx.optim.sgd(0.1),
    )
    state = engine.create_state({"w": np.zeros((256, 128)), "b": np.zeros(128)})
    batch = np.zeros((4, 256), np.float32)
    return engine.audit(train_step, state, batch, target=available(target), mesh={"data": N})


def gradients_of(report):
    return [row for row in report.collectives if row.tags != ("pmean/loss",)]


@pytest.mark.parametrize("target", ["cpu:8", "cuda:h100:8", "tpu:v5e:2x4"])
@pytest.mark.parametrize("name", CASES)
def test_bytes_on_the_wire(name, target):
    compression, dtype, wanted = CASES[name]
    report = audit(target, compression)
    assert report.exact, report
    rows = gradients_of(report)
    # The loss, 4 bytes, may be in the same all-reduce.
    sent = sum(row.wire_bytes for row in report.collectives) - TWICE * 4
    if name == "top-k" and any(row.kind == "all-reduce" for row in rows):
        wanted *= 2  # libtpu makes small gathers sums of zeros and values
    assert sent == wanted
    if dtype is not None:
        assert {row.wire_dtype for row in rows} == {dtype}
    assert all(row.dtype == row.wire_dtype for row in rows)
    for line in report.plan:
        if line.what == "gradients":
            assert (line.found_bytes, line.factor) == (line.payload_bytes, "mean")
    share = {"bf16": 0.5, "fp16": 0.503, "int8": 0.255, "powersgd": 0.0273, "top-k": 0.161}[name]
    assert sent / PLAIN <= share


@pytest.mark.parametrize("target", ["cpu:8", "cuda:h100:8", "tpu:v5e:2x4"])
@pytest.mark.parametrize("name", ["int8", "powersgd"])
def test_sharded_moments(name, target):
    """int8 scatters in one exchange; the parameters are gathered as they are."""
    report = audit(target, CASES[name][0], shard="optimizer")
    assert report.exact, report
    assert all(line.found_bytes == line.payload_bytes for line in report.plan[:2])
    if name == "int8":
        kinds = {row.kind: row.wire_bytes for row in gradients_of(report) if row.dtype == "int8"}
        assert kinds == {"all-to-all": ONCE * (SIZE + 4 * N * BLOCKS)}


@pytest.mark.parametrize("target", ["cpu:8", "cuda:h100:8", "tpu:v5e:2x4"])
def test_both_exchanges_are_in_the_program_of_a_later_start(target):
    report = audit(target, tx.compression.powersgd(2, start=10))
    assert report.exact, report
    lines = [line for line in report.plan if line.what == "gradients"]
    assert sum(line.payload_bytes for line in lines) == 4 * SIZE + 4 * (2 * (256 + 128) + 128)
    assert all(line.found_bytes == line.payload_bytes for line in lines)
