"""txcore's collectives beside plain jax's of the same program, compiled for other machines."""

import pytest
from target_cases import available

from benchmarks.collective_counts import PROGRAMS, TARGETS, audit_steps, count

STEPS = ("MNIST's CNN", "12-layer MLP", "block, ZeRO 1")
# Of single collectives the TPU's compiler is the one that compares attributes before it combines.
CASES = [(name, target) for name in STEPS for target in TARGETS]
CASES += [(name, "tpu:v5e:2x4") for name in PROGRAMS if name not in STEPS]


@pytest.mark.parametrize("name, target", CASES)
def test_never_more_than_plain_jax(name, target):
    own, plain = audit_steps(name, available(target))
    assert own.exact, own
    assert count(own) <= count(plain), f"{count(own)} for {count(plain)}"


@pytest.mark.parametrize("target", ["tpu:v5e:2x4", "cuda:h100:8"])
def test_one_combined_op_names_every_leaf(target):
    own, _ = audit_steps("12-layer MLP", available(target))
    [row] = own.collectives
    leaves = {f"pmean/grads.{i}" for i in range(12)}
    assert set(row.tags) == {*leaves, "pmean/loss"}
    assert {part.tag: part.payload_bytes for part in row.parts if part.tag != "pmean/loss"} == (
        dict.fromkeys(leaves, 4 * 64 * 64)
    )
    assert all("combined" in fate.fates for fate in own.fates)
