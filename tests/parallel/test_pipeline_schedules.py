"""Schedules as data: complete, in order, with the papers' times, bubbles and buffers."""

import dataclasses
import xml.etree.ElementTree
from fractions import Fraction

import numpy as np
import pytest

import txcore as tx
from txcore.parallel.pipeline.buffers import Buffers, check_buffers, color_intervals, plan_buffers
from txcore.parallel.pipeline.making import place_orders
from txcore.parallel.pipeline.slots import Slots, used_ticks
from txcore.parallel.pipeline.ticks import cut_ticks

KINDS = [("gpipe", 1), ("gpipe", 2), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3)]
KINDS += [("zb-h1", 1)]
STAGES, MICROBATCHES = (1, 2, 3, 4, 8), (1, 2, 3, 4, 5, 8, 12, 16)


def make(name, p=4, m=8, v=1):
    return tx.pipeline.make_schedule(name, stages=p, microbatches=m, chunks=v)


@pytest.mark.parametrize("name,v", KINDS)
@pytest.mark.parametrize("p", STAGES)
def test_every_table_is_valid_and_its_time_is_the_papers(name, v, p):
    for m in MICROBATCHES:
        schedule = make(name, p, m, v)  # which checks that it is complete and in order
        buffers = plan_buffers(schedule)
        check_buffers(schedule, buffers)
        assert len(list(cut_ticks(schedule))) <= 5
        assert sum(len(segment.ticks) for segment in cut_ticks(schedule)) == schedule.ticks
        if name == "zb-h1":
            assert schedule.ticks == 2 * m + max(m, p) + p - 1
            assert buffers.stash.size == min(p, m)
            if m >= p:
                assert schedule.find_bubble() == Fraction(p - 1, 3 * m + p - 1)
            continue
        assert (buffers.activations.size, buffers.cotangents.size) == (
            1,
            m if name == "gpipe" else 1,
        )
        if m % p and v > 1:
            continue  # the last group has gaps
        assert schedule.find_bubble() == Fraction(p - 1, m * v + p - 1)
        assert schedule.find_bubble(2, 3, 5) == Fraction(p - 1, m * v + p - 1)
        if name == "gpipe":
            assert schedule.ticks == 2 * (m * v + p - 1)
            assert buffers.stash.size == m * v
        else:
            assert schedule.ticks == m * v + p * v + p - 2
            assert buffers.stash.size == min(p * v + p - 1, m * v)


@pytest.mark.parametrize("p,m", [(2, 8), (4, 8), (4, 32), (8, 16)])
def test_zero_bubble_waits_a_third_of_the_time(p, m):
    """Of the time of waiting, for m microbatches of the same work: (p - 1) units for 3 (p - 1)."""
    idle = [make(name, p, m).count_time() - 3 * m for name in ("1f1b", "zb-h1")]
    assert idle == [3 * (p - 1), p - 1]


def test_the_pictures_of_the_papers():
    """Drawn by hand from the papers' rules."""
    assert str(make("zb-h1", 2, 3)).splitlines() == [
        "zb-h1: 2 stages, 3 microbatches, 10 ticks, bubble 1/10",
        "device 0  F0 F1 .  B0 W0 F2 B1 W1 B2 W2",
        "device 1  .  F0 B0 F1 B1 W0 F2 B2 W1 W2",
    ]
    assert str(make("gpipe", 2, 3)).splitlines() == [
        "gpipe: 2 stages, 3 microbatches, 8 ticks, bubble 1/4",
        "device 0  F0 F1 F2 .  .  B0 B1 B2",
        "device 1  .  F0 F1 F2 B0 B1 B2 .",
    ]
    assert str(make("interleaved", 2, 2, 2)).splitlines() == [
        "interleaved: 2 stages of 2 chunks, 2 microbatches, 8 ticks, bubble 1/5",
        "device 0  F0.0 F1.0 F0.1 F1.1 .    .    B0.1 B1.1 B0.0 B1.0",
        "device 1  .    F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 B0.0 B1.0 .",
    ]


def test_the_drawing_has_a_box_for_each_pass():
    drawn = xml.etree.ElementTree.fromstring(make("1f1b", 2, 3).to_svg())
    boxes = drawn.findall("{*}rect")
    assert len(boxes) == 2 * 3 * 2
    assert sorted(str(t.text) for t in drawn.findall("{*}text")) == sorted(
        f"{kind}{j}" for kind in "FB" for j in range(3) for _ in range(2)
    )
    # A whole backward pass is two units long; the picture is as long as the schedule takes.
    unit = min(int(box.get("width")) for box in boxes)
    assert {int(box.get("width")) for box in boxes} == {unit, 2 * unit}
    assert int(drawn.get("width")) == unit * make("1f1b", 2, 3).count_time()


def moved(slots, stage, of, to):
    """Return slots with a stage's work of tick `of` at tick `to`."""
    tables = [table.copy() for table in slots]
    for table in tables:
        table[to, stage], table[of, stage] = table[of, stage], -1
    return Slots(*tables)


def test_what_is_too_early_is_refused():
    schedule = make("1f1b", 2, 3)
    with pytest.raises(
        ValueError,
        match="a Schedule needs F0 of device 1 at tick 1 or later, since it uses what F0 of "
        "device 0 makes, got tick 0",
    ):
        dataclasses.replace(schedule, forward=moved(schedule.forward, 1, 1, 0))
    with pytest.raises(ValueError, match=r"needs B0 of device 0 at tick 2 or later.*got tick 1"):
        dataclasses.replace(schedule, backward=moved(schedule.backward, 0, 2, 1))
    split = make("zb-h1", 2, 3)
    with pytest.raises(ValueError, match=r"needs W0 of device 0 at tick 3 or later.*got tick 2"):
        dataclasses.replace(split, weight=moved(split.weight, 0, 4, 2))


def test_what_is_missing_or_doubled_is_refused():
    schedule = make("1f1b", 2, 3)
    tables = [table.copy() for table in schedule.backward]
    tables[0][tables[0] == 2] = 1
    with pytest.raises(ValueError, match="each piece of work once, got B1 2 times on device 0"):
        dataclasses.replace(schedule, backward=Slots(*tables))
    with pytest.raises(ValueError, match=r"needs forward.microbatch from 0 to 1,.*got 0 to 2"):
        dataclasses.replace(schedule, microbatches=2)
    with pytest.raises(ValueError, match=r"got int64 \(5, 2\) for forward.chunk"):
        slots = schedule.forward._replace(chunk=np.int64(schedule.forward.chunk))
        dataclasses.replace(schedule, forward=slots)


def test_swapped_stages_are_refused():
    """The table of stage 0 on device 1 and the other way round."""
    schedule = make("1f1b", 2, 3)
    swapped = {
        name: Slots(*(table[:, ::-1] for table in getattr(schedule, name)))
        for name in ("forward", "backward", "weight")
    }
    with pytest.raises(ValueError, match=r"needs B0 of device 0 at tick 3 or later.*got tick 1"):
        dataclasses.replace(schedule, **swapped)


def test_a_deadlock_is_refused():
    orders = [[("F", 0), ("F", 1), ("B", 1), ("B", 0)], [("F", 0), ("B", 0), ("F", 1), ("B", 1)]]
    placed = place_orders("reversed", orders, microbatches=2)
    assert placed.ticks == 7
    orders[1] = [("F", 1), ("B", 1), ("F", 0), ("B", 0)]
    orders[0] = [("F", 0), ("B", 0), ("F", 1), ("B", 1)]
    with pytest.raises(
        ValueError,
        match="the orders of schedule 'mine' end in a deadlock at tick 1: waiting are B0 on "
        "device 0, F1 on device 1",
    ):
        place_orders("mine", orders, microbatches=2)


@pytest.mark.parametrize("name,v", KINDS)
@pytest.mark.parametrize("buffer", ["activations", "stash", "cotangents", "held"])
def test_a_buffer_one_slot_smaller_is_refused(name, v, buffer):
    """So each is as small as can be."""
    schedule = make(name, 4, 8, v)
    buffers = plan_buffers(schedule)
    whole = getattr(buffers, buffer)
    if (whole.slot < 0).all():
        return  # without weight passes nothing is held
    size = whole.size - 1
    slot = np.where(whole.slot < 0, -1, whole.slot % max(size, 1))
    small = dataclasses.replace(
        buffers, **{buffer: dataclasses.replace(whole, size=size, slot=slot)}
    )
    with pytest.raises(ValueError, match=f"buffer '{buffer}' needs"):
        check_buffers(schedule, small)


def test_colours_are_those_of_the_most_that_is_alive():
    """Truth by counting, for random intervals."""
    rng = np.random.default_rng(0)
    start = rng.integers(0, 30, (2, 20, 2))
    stop = start + rng.integers(0, 9, start.shape)
    alive = [((start <= t) & (t <= stop)).sum((1, 2)).max() for t in range(40)]
    assert color_intervals(start, stop).size == max(alive)


@pytest.mark.parametrize(
    "options,text",
    [
        (("zero",), "needs a name of 'gpipe', '1f1b', 'interleaved', 'zb-h1', got 'zero'"),
        (("1f1b", 0), "needs stages= 1 or more, got 0"),
        (("1f1b", 2, 0), "needs microbatches= 1 or more, got 0"),
        (("gpipe", 2, 2, 0), "needs chunks= 1 or more, got 0"),
        (("interleaved", 2, 2, 1), "'interleaved' needs chunks= 2 or more, got 1: of one chunk"),
        (("zb-h1", 2, 2, 2), "'zb-h1' needs chunks=1, got 2: several chunks a stage are"),
    ],
)
def test_impossible_schedules_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        make(*options)


def test_layers_go_to_stages_in_order():
    layers = {"w": np.arange(12)}
    split = tx.pipeline.split_layers(layers, make("interleaved", 2, 4, 3))["w"]
    assert split.shape == (3, 4)
    assert split[1, :2].tolist() == [4, 5]  # virtual stage 2, by P(None, "pipe")
    assert tx.pipeline.split_layers(layers, make("1f1b", 2, 4))["w"] is layers["w"]
    with pytest.raises(
        ValueError,
        match=r"needs a multiple of 8 layers, 2 chunks on each of 4 stages, got shape \(12,\) at "
        r"layers\['w'\]",
    ):
        tx.pipeline.split_layers(layers, make("interleaved", 4, 4, 2))


def test_used_ticks_of_nothing_are_none():
    assert used_ticks(make("1f1b").weight) == range(0)
    assert isinstance(plan_buffers(make("1f1b")), Buffers)
