"""Times of single collectives and pieces of work on a toy chip, counted by hand."""

import dataclasses

import pytest

from txcore.profiling.cost.instruction import Work
from txcore.profiling.cost.machine import Machine
from txcore.profiling.hlo import find_collectives
from txcore.profiling.targets import Chip

# A link sends 10 bytes a second, a network card 1.
GPU = Chip("toy", 200.0, 100.0, 1e9, 50.0, 1, 10.0, 4, 1.0)
TPU = Chip("toy", 200.0, 100.0, 1e9, 50.0, 4, 10.0, 256, None)
HOSTS = Machine(GPU, tuple((i // 4,) for i in range(8)), latency=0.0)  # 2 hosts of 4
TORUS = Machine(TPU, tuple((i // 4, i % 4) for i in range(8)), latency=0.0)  # 2 x 4


def op(kind, who):
    """Read a collective whose operand has 80 bytes."""
    key = "source_target_pairs" if kind == "collective-permute" else "replica_groups"
    (found,) = find_collectives(
        "HloModule m, num_partitions=8\nENTRY %e (x: f32[20]) -> f32[20] {\n"
        f"  %x = f32[20]{{0}} parameter(0)\n  ROOT %r = f32[20]{{0}} {kind}(%x), channel_id=1, "
        f"{key}={who}, use_global_device_ids=true\n}}\n"
    )
    return found


def seconds(machine, kind, who):
    return machine.transfer_of(op(kind, who)).seconds


ALL, ONE_HOST, PAIRS = "{{0,1,2,3,4,5,6,7}}", "{{0,1,2,3},{4,5,6,7}}", "{{0,4},{1,5},{2,6},{3,7}}"


@pytest.mark.parametrize(
    "kind, who, expected",
    [
        ("all-reduce", ONE_HOST, 80 * 6 / 4 / 10),
        ("reduce-scatter", ONE_HOST, 80 * 3 / 4 / 10),
        ("all-gather", ONE_HOST, 4 * 80 * 3 / 4 / 10),
        ("all-to-all", ONE_HOST, 80 * 3 / 4 / 10),
        # Four network cards in a host together send 4 bytes a second.
        ("all-reduce", ALL, 80 * 14 / 8 / 4),
        ("all-reduce", PAIRS, 80 / 1),  # one member in each host: its own card alone
        # Each sends half of its 80 bytes to the other host.
        ("all-to-all", ALL, 40 / 1),
        ("collective-permute", "{{0,1},{1,2},{2,3},{3,0}}", 80 / 10),
        ("collective-permute", "{{0,1},{3,4}}", 80 / 1),  # the slowest pair
        ("all-reduce", "{{0,1},{3,4},{6,7}}", 80 / 1),  # the slowest group
        ("all-reduce", "{{0},{1},{2},{3},{4},{5},{6},{7}}", 0),
    ],
)
def test_hosts_of_gpus(kind, who, expected):
    assert seconds(HOSTS, kind, who) == pytest.approx(expected)


ROWS, COLUMNS = ONE_HOST, PAIRS  # lines of 4 and of 2 in the torus


@pytest.mark.parametrize(
    "kind, who, expected",
    [
        ("all-reduce", ROWS, 80 * 6 / 4 / 20),  # both ways round the ring
        ("all-reduce", COLUMNS, 80 / 10),  # two neighbours have one link
        ("all-reduce", ALL, 80 * 14 / 8 / 30),
        # In a ring of 4 a byte goes 1 link far on average, over two links of each chip.
        ("all-to-all", ROWS, 80 * 1 / 20),
        ("all-to-all", COLUMNS, 80 * 0.5 / 10),
        ("collective-permute", "{{0,1},{1,2},{2,3},{3,0}}", 80 / 10),
        ("collective-permute", "{{0,2},{1,3},{2,0},{3,1}}", 80 * 2 / 10),
        ("collective-permute", "{{0,5}}", 80 * 2 / 10),
        ("collective-permute", "{{3,3}}", 80 / 10),
    ],
)
def test_a_torus(kind, who, expected):
    assert seconds(TORUS, kind, who) == pytest.approx(expected)


@pytest.mark.parametrize(
    "who, expected",
    [
        (ROWS, 80 / 20),  # half of the bytes either way
        (COLUMNS, 80 / 10),  # two neighbours have one link
        (ALL, 2 * 80 / 20),  # from the end of a row to the next row's start are two links
    ],
)
def test_a_kernels_copies_go_round_the_ring_of_the_meshs_order(who, expected):
    ring = dataclasses.replace(op("all-reduce", who), kind="remote-dma")
    assert TORUS.transfer_of(ring).seconds == pytest.approx(expected)
    late = dataclasses.replace(TORUS, latency=100.0).transfer_of(ring).seconds
    hops = {ROWS: 3, COLUMNS: 1, ALL: 7 * 2}[who]
    assert late - expected == pytest.approx(100 * hops)


def test_a_send_to_another_program_takes_a_link():
    (send,) = find_collectives(
        "HloModule m\nENTRY %e (x: f32[20]) -> () {\n  %x = f32[20]{0} parameter(0)\n"
        "  %t = token[] after-all()\n"
        "  ROOT %r = (f32[20]{0}, u32[], token[]) send(%x, %t), channel_id=1\n}\n"
    )
    assert TORUS.transfer_of(send).seconds == HOSTS.transfer_of(send).seconds == 8.0


def test_what_each_occupies():
    assert TORUS.transfer_of(op("all-reduce", ROWS)).links == {"ici1"}
    assert TORUS.transfer_of(op("all-reduce", COLUMNS)).links == {"ici0"}
    assert TORUS.transfer_of(op("all-reduce", ALL)).links == {"ici0", "ici1"}
    assert HOSTS.transfer_of(op("all-reduce", ROWS)).links == {"collectives"}


@pytest.mark.parametrize(
    "machine, kind, who, steps",
    [
        (HOSTS, "all-reduce", ONE_HOST, 6),
        (HOSTS, "reduce-scatter", ONE_HOST, 3),
        (HOSTS, "all-reduce", ALL, 6 + 2),  # in each host, and between two
        (HOSTS, "all-gather", ALL, 3 + 1),
        (HOSTS, "collective-permute", "{{3,4}}", 1),
        (TORUS, "all-reduce", ALL, 2 * (1 + 3)),  # along 2 and along 4
        (TORUS, "collective-permute", "{{0,6}}", 3),
    ],
)
def test_latency_is_that_of_the_steps(machine, kind, who, steps):
    slow = dataclasses.replace(machine, latency=100.0)
    extra = seconds(slow, kind, who) - seconds(machine, kind, who)
    assert extra == pytest.approx(100 * steps)


def test_a_device_that_the_machine_lacks_is_refused():
    with pytest.raises(ValueError, match="device 7, but the machine has 4"):
        Machine(GPU, HOSTS.places[:4]).transfer_of(op("all-reduce", ALL))


@pytest.mark.parametrize(
    "work, expected",
    [
        (Work((("bfloat16", 400),), 50), 2.0),  # computing takes longer
        (Work((("bfloat16", 400),), 150), 3.0),  # moving does
        (Work((("float32", 400),)), 4.0),
        (Work((("float8_e4m3fn", 400), ("float16", 200), ("float32", 100))), 4.0),
        (Work(), 0.0),
    ],
)
def test_the_roofline(work, expected):
    assert HOSTS.compute_seconds(work) == pytest.approx(expected)
