"""The figures of traces that were written by hand."""

import dataclasses

import pytest
from hand_made import ADDED, HLO, US, make_event, make_rank, make_run

from txcore.profiling.trace.model import TraceError
from txcore.profiling.trace.show.table import format_trace
from txcore.profiling.trace.trace import measure_ranks

LOOP = """HloModule jit_step

%cond (p: (s32[], f32[4])) -> pred[] {
  %p = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(2)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (q: (s32[], f32[4])) -> (s32[], f32[4]) {
  %q = (s32[], f32[4]{0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %v = f32[4]{0} get-tuple-element(%q), index=1
  %inner = f32[4]{0} negate(%v)
  ROOT %out = (s32[], f32[4]{0}) tuple(%j, %inner)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %zero = s32[] constant(0)
  %t = (s32[], f32[4]{0}) tuple(%zero, %x)
  %loop = (s32[], f32[4]{0}) while(%t), condition=%cond, body=%body
  %g = f32[4]{0} get-tuple-element(%loop), index=1
  ROOT %after = f32[4]{0} negate(%g)
}
"""


def test_waiting_ends_when_the_last_device_arrives():
    early, late = make_run(0, arrive=10, leave=30), make_run(0, device=1, arrive=25, leave=31)
    (found,) = measure_ranks([make_rank([*early, *late])]).collectives
    assert (found.calls, found.runs) == (2, 2)
    assert found.total == (20 + 6) * US
    assert found.waiting == 15 * US
    assert found.moving == 11 * US
    assert found.fastest == 5 * US
    # 250 floats over two devices: 2(n-1)/n x 1000 bytes each, in 5 microseconds.
    assert found.measured_bytes == found.predicted_bytes == 1000
    assert found.bus_bandwidth == pytest.approx(1000 / 5e-6)
    assert (found.hidden, found.exposed) == (0, found.total)


def test_rows_say_tag_kind_and_source():
    (found,) = measure_ranks([make_rank([*make_run(0), *make_run(0, device=1)])]).collectives
    row = found.row
    assert (row.kind, row.origin, row.tags) == ("all-reduce", "txcore", ("pmean/grads",))
    assert (row.source, row.group_size) == ("m.py:9", 2)


def test_waiting_is_unknown_where_a_rank_is_missing():
    rank = make_rank(make_run(0), devices=(0,), processes=2)
    (found,) = measure_ranks([rank]).collectives
    assert found.waiting is None
    assert found.moving is None
    assert found.total == 20 * US


def test_a_step_is_parted_into_what_it_does():
    # 0-10 dot, 10-30 all-reduce with 20-25 hidden under another op, 30-40 tail; then 40-60 nothing
    # runs: input 42-50, host 48-55; the second run is 60-100.
    events = [*make_run(0), *make_run(60, run=2), make_event("dot.1", 20, 25)]
    work = [("input", 42, 50), ("host", 48, 55), ("host", 5, 8)]
    trace = measure_ranks([make_rank(events, work=work)])
    first, second = trace.steps
    assert (first.start, first.end) == (0, 40 * US)
    assert (first.compute, first.hidden, first.exposed) == (25 * US, 5 * US, 15 * US)
    assert (second.start, second.end) == (40 * US, 100 * US)
    assert (second.compute, second.hidden, second.exposed) == (20 * US, 0, 20 * US)
    assert (second.input, second.host, second.idle) == (8 * US, 5 * US, 7 * US)
    (found,) = trace.collectives
    assert (found.hidden, found.exposed) == (5 * US, 35 * US)


def test_overlapping_operations_are_one_time_not_two():
    events = [make_event("dot.1", 0, 10), make_event("tail.2", 5, 12), make_event("dot.1", 6, 8)]
    (step,) = measure_ranks([make_rank(events)]).steps
    assert step.compute == 12 * US


def test_an_op_in_a_pool_ends_when_its_result_is_needed():
    # The profiler's "end" comes at 90, after the thread has gone on with the all-reduce.
    events = [
        make_event("dot.1", 0, 2, latest=90),
        make_event("all-reduce.1", 20, 60),
        make_event("tail.2", 60, 95),
    ]
    (step,) = measure_ranks([make_rank(events)]).steps
    assert (step.compute, step.hidden, step.exposed) == ((20 + 35) * US, 0, 40 * US)
    # One that nothing in the trace needs has ended when the profiler says so.
    events[2] = make_event("tail.2", 60, 61, latest=95)
    events.append(make_event("other", 96, 97))
    (step,) = measure_ranks([make_rank(events)]).steps
    assert step.compute == (20 + 35 + 1) * US


def test_a_loop_is_what_runs_in_it():
    events = [
        make_event("loop", 0, 1, latest=99),
        make_event("inner", 2, 3, latest=10),
        make_event("inner", 20, 21, latest=99),
        make_event("after", 40, 50),
    ]
    trace = measure_ranks([make_rank(events, hlo=LOOP)])
    # The second pass has ended when the loop has, which is when `after` needs its result.
    assert [(e.op, e.start // US, e.end // US) for e in trace.events] == [
        ("inner", 0, 8),  # the first event is at 0
        ("inner", 18, 38),
        ("after", 38, 48),
    ]


def test_runs_without_numbers_are_told_apart():
    events = [event._replace(run=0) for at in (0, 100, 200) for event in make_run(at)]
    trace = measure_ranks([make_rank(events)])
    assert [event.run for event in trace.events] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(trace.steps) == 3
    assert trace.collectives[0].measured_bytes == 1000


def test_a_cut_off_run_is_said_and_left_out():
    runs = [make_run(100 * i, run=i + 1) for i in range(4)]
    events = [*runs[0][1:], *runs[1], *runs[2], runs[3][0]]
    trace = measure_ranks([make_rank(events)])
    assert len(trace.steps) == 2
    assert [note for note in trace.notes if "cut off" in note] == [
        "rank 0 device 0: the first run lacks 1 of its operations: the trace was cut off in it, "
        "and it is left out of the steps",
        "rank 0 device 0: the last run lacks 2 of its operations: the trace was cut off in it, "
        "and it is left out of the steps",
    ]


def two_hosts(offset, host="b", clock=1):
    """Rank 1's clock is `offset` ahead; it arrives 12 us after rank 0 in each of 4 runs."""
    first = [e for i in range(4) for e in make_run(100 * i, run=i + 1, arrive=10, leave=30)]
    second = [
        event._replace(start=event.start + offset, end=event.end + offset)
        for i in range(4)
        for event in make_run(100 * i, run=i + 1, arrive=22, leave=30)
    ]
    return [
        make_rank(first, devices=(0,), clock=5),
        make_rank(second, rank=1, devices=(1,), host=host, clock=clock),
    ]


@pytest.mark.parametrize("offset", [0, 7_000_000, -3_000_123])
def test_clocks_of_other_hosts_are_set_by_the_ends_of_collectives(offset):
    trace = measure_ranks(two_hosts(offset))
    (found,) = trace.collectives
    assert found.waiting == 4 * 12 * US
    assert found.moving == 4 * (8 + 8) * US
    (note,) = trace.notes
    assert note.startswith("rank 1's clock is set by the ends of 4 collectives, ")


def test_processes_of_one_host_share_its_clock():
    # Both clocks say when 0 was, so the trace of rank 1 began 3 us after that of rank 0.
    trace = measure_ranks(two_hosts(-3000, host="a", clock=3005))
    (found,) = trace.collectives
    assert found.waiting == 4 * 12 * US
    assert trace.notes == ()


def test_a_rank_that_is_always_late_is_named():
    events = [
        e for i in range(5) for e in make_run(100 * i, run=i + 1, arrive=10, leave=80, done=90)
    ]
    late = [
        event
        for i in range(5)
        for event in make_run(100 * i, run=i + 1, device=1, arrive=70, leave=80, done=90)
    ]
    trace = measure_ranks([make_rank([*events, *late])])
    (named,) = trace.stragglers
    assert (named.rank, named.device, named.against, named.cause) == (0, 1, "others", "compute")
    assert (named.own, named.usual) == (100 * US, 40 * US)
    assert (
        "straggler: rank 0 device 1 works 100 us a step, the others 40 us: most of it in compute"
        in format_trace(trace)
    )


def test_a_rank_that_is_late_once_is_named_with_its_step():
    def runs(device, late):
        at = 0
        for i in range(6):
            arrive = 70 if i == 3 and late else 10
            yield from make_run(
                at, i + 1, device, arrive, 80 if i == 3 else 12, 90 if i == 3 else 20
            )
            at += 90 if i == 3 else 20

    trace = measure_ranks([make_rank([*runs(0, False), *runs(1, True)])])
    (named,) = trace.stragglers
    assert (named.device, named.against, named.step) == (1, "its past", 3)
    assert (named.own, named.usual) == (90 * US, 20 * US)


def test_equal_ranks_are_not_named():
    events = [
        e
        for i in range(6)
        for device in (0, 1)
        for e in make_run(100 * i, i + 1, device, 10 + (i + device) % 2, 30, 40)
    ]
    assert measure_ranks([make_rank(events)]).stragglers == ()


def test_a_collective_that_nobody_declared_fails():
    trace = measure_ranks([make_rank([*make_run(0), *make_run(0, device=1)], hlo=ADDED)])
    assert not trace.ok
    assert format_trace(trace).splitlines()[-1] == (
        "failed: the program did not declare all-reduce all-reduce.1 of jit_step "
        "(partitioner, m.py:9)"
    )
    assert measure_ranks([make_rank([*make_run(0), *make_run(0, device=1)])]).ok


@pytest.mark.parametrize("op", ["all-reduce.4", "psum_invariant.31", "reduce_scatter.7"])
def test_a_collective_of_no_known_program_fails(op):
    events = [*make_run(0), make_event(op, 50, 60, module="jit_other")]
    trace = measure_ranks([make_rank(events)])
    assert [c.row.op for c in trace.undeclared] == [op]
    assert "no HLO of jit_other" in trace.notes[0]


def test_another_program_is_chosen_by_name():
    events = [*make_run(0), make_event("dot.1", 50, 51, module="jit_other")]
    assert measure_ranks([make_rank(events)]).program == "jit_step"
    assert measure_ranks([make_rank(events)], program="jit_other").program == "jit_other"
    with pytest.raises(TraceError, match="has those of jit_other, jit_step: name one of them"):
        measure_ranks([make_rank(events)], program="jit_third")


def test_bandwidth_is_compared_with_the_nearest_measured_size():
    events = [*make_run(0), *make_run(0, device=1)]
    best = {
        ("cpu", 1, "all-reduce", 2): [(10, 1.0), (900, 1e8), (10**6, 5e8)],
        ("cpu", 1, "all-reduce", 4): [(1000, 7.0)],
        ("cpu", 2, "all-reduce", 2): [(1000, 8.0)],
    }
    (found,) = measure_ranks([make_rank(events)], best=best).collectives
    assert found.best == 1e8
    assert found.bus_bandwidth == pytest.approx(1000 / 20e-6)
    assert " 50%" in format_trace(measure_ranks([make_rank(events)], best=best))


def test_a_trace_without_events_says_so():
    rank = make_rank([], devices=())
    trace = measure_ranks([rank])
    assert (trace.steps, trace.collectives, trace.ok) == ((), (), True)
    assert "nothing ran while it was recorded" in format_trace(trace)
    tpu = measure_ranks([dataclasses.replace(rank, platform="tpu")])
    assert "those of TPUs are not read yet" in format_trace(tpu)


def test_a_collective_that_did_not_run_has_no_calls():
    (found,) = measure_ranks([make_rank([make_event("dot.1", 0, 1)])]).collectives
    assert (found.calls, found.measured_bytes, found.predicted_bytes) == (0, 0, 1000)
    assert "all-reduce" in HLO
