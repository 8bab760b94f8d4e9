"""nccl-tests' factors, against its table and against rings that count what they send."""

import pytest

from txcore.profiling.bandwidth import bus_factor, ring_steps, wire_bytes

# The table of nccl-tests' PERFORMANCE.md for 8 ranks.
TABLE = {
    "all-reduce": 2 * 7 / 8,
    "reduce-scatter": 7 / 8,
    "all-gather": 7 / 8,
    "all-to-all": 7 / 8,
    "ragged-all-to-all": 7 / 8,
    "collective-broadcast": 1,
    "collective-permute": 1,
    "send": 1,
}


@pytest.mark.parametrize("kind, factor", TABLE.items())
def test_the_table(kind, factor):
    assert float(bus_factor(kind, 8)) == factor
    assert wire_bytes(kind, 8, 800) == factor * 800


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_a_ring_sends_what_the_factor_says(n):
    part, sent, steps = 12, 0, 0  # each device starts with n parts of 12 bytes
    for _ in range(n - 1):  # reduce-scatter: each step passes one part on
        sent, steps = sent + part, steps + 1
    assert (wire_bytes("reduce-scatter", n, n * part), ring_steps("reduce-scatter", n)) == (
        sent,
        steps,
    )
    assert (wire_bytes("all-reduce", n, n * part), ring_steps("all-reduce", n)) == (
        2 * sent,
        2 * steps,
    )


def test_a_part_of_a_byte_counts_whole():
    assert wire_bytes("all-gather", 3, 4) == 3  # 8/3


def test_a_group_of_no_device_is_refused():
    with pytest.raises(ValueError, match="needs a group of at least 1 device, but got 0"):
        wire_bytes("all-reduce", 0, 4)
