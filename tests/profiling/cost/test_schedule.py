"""The clock, on hand-made schedules of a toy chip whose answers are counted by hand.

A product of two 1000 x 1000 takes 2 ms, an all-reduce of a million bytes on two devices 1 ms.
"""

import pytest

from txcore.profiling.cost.machine import Machine
from txcore.profiling.cost.schedule import schedule
from txcore.profiling.hlo import groups_of_block
from txcore.profiling.targets import Chip

GPU = Chip("toy", 1e12, 1e12, 80e9, 1e12, 1, 1e9, 8, 1e8)
TPU = Chip("toy", 1e12, 1e12, 80e9, 1e12, 4, 1e9, 64, None)
TWO = Machine(GPU, ((0,), (0,)), latency=0.0)

HEAD = "HloModule m, is_scheduled=true, num_partitions=2\n"
MATRIX = "f32[1000,1000]{1,0}"
CONTRACT = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
GROUP = "channel_id=1, replica_groups={{0,1}}, to_apply=%add"


def parameters(**types):
    return [f"%{name} = {t} parameter({i})" for i, (name, t) in enumerate(types.items())]


def array(mega):
    return f"f32[{mega * 250_000}]{{0}}"


def entry(*lines, before=""):
    sizes = dict(a=MATRIX, **{f"x{mega}": array(mega) for mega in (1, 2, 3, 4, 5)})
    body = [*parameters(**sizes), *lines, "ROOT %end = () tuple()"]
    return HEAD + before + "ENTRY %main (...) -> () {\n" + "".join(f"  {x}\n" for x in body) + "}\n"


def computation(name, *lines):
    return f"%{name} (...) -> () {{\n" + "".join(f"  {line}\n" for line in lines) + "}\n\n"


def dot(name="d"):
    return f"%{name} = {MATRIX} dot(%a, %a), {CONTRACT}"


def start(name, mega):
    return f"%{name} = {array(mega)} all-reduce-start(%x{mega}), {GROUP}"


def done(name, mega):
    return f"%{name}.done = {array(mega)} all-reduce-done(%{name})"


def sync(name, mega):
    return f"%{name} = {array(mega)} all-reduce(%x{mega}), {GROUP}"


def ms(*seconds):
    return pytest.approx([1e-3 * s for s in seconds], abs=1e-9)


def check(text, *, step, exposed, rows, machine=TWO):
    """Compare, all in ms: the step, the exposed part of it, and each row's exposed part."""
    found = schedule(text, machine=machine)
    assert [found.seconds, found.exposed_seconds] == ms(step, exposed)
    assert {o.op: o.exposed_seconds for o in found.overlaps} == pytest.approx(
        {name: 1e-3 * value for name, value in rows.items()}, abs=1e-9
    )
    return found


def test_nothing_hides_a_synchronous_one():
    found = check(entry(dot(), sync("s", 1), dot("e")), step=5, exposed=1, rows={"s": 1})
    assert (found.flops, found.bytes) == (2 * 2 * 10**9, 2 * 2 * 4 * 10**6)
    (row,) = found.overlaps
    assert (row.is_async, row.hidden, row.flops, row.wire_bytes) == (False, 0.0, 0, 10**6)


def test_compute_between_start_and_done_hides():
    text = entry(start("s", 1), dot(), done("s", 1))
    found = check(text, step=2, exposed=0, rows={"s": 0})
    (row,) = found.overlaps
    assert (row.is_async, row.hidden, row.flops, row.bytes) == (True, 1.0, 2 * 10**9, 8 * 10**6)
    assert found.hidden == 1.0


def test_a_part_is_hidden():
    text = entry(start("s", 3), dot(), done("s", 3))
    found = check(text, step=3, exposed=1, rows={"s": 1})
    assert found.overlaps[0].hidden == pytest.approx(2 / 3)


def test_compute_before_the_start_and_after_the_done_hides_nothing():
    text = entry(dot("d"), start("s", 3), done("s", 3), dot("e"))
    found = check(text, step=7, exposed=3, rows={"s": 3})
    assert found.overlaps[0].flops == 0


@pytest.mark.parametrize("order", [("s", "t"), ("t", "s")])
def test_two_on_one_link_share_the_compute_between(order):
    text = entry(start("s", 3), start("t", 3), dot(), *(done(name, 3) for name in order))
    found = check(text, step=6, exposed=4, rows={"s": 1, "t": 3})
    assert found.hidden == pytest.approx(2 / 6)  # a sum would claim 4/6
    assert [o.flops for o in found.overlaps] == [2 * 10**9] * 2  # each has it between


def test_a_synchronous_one_waits_for_the_link():
    text = entry(start("s", 3), sync("t", 1), dot(), done("s", 3))
    check(text, step=6, exposed=4, rows={"s": 3, "t": 1})


def test_two_on_different_links_are_hidden_together():
    groups = "channel_id=1, replica_groups={}, to_apply=%add".format
    rows, columns = "{{0,1},{2,3}}", "{{0,2},{1,3}}"
    text = entry(
        start("s", 2).replace(GROUP, groups(rows)),
        start("t", 2).replace(GROUP, groups(columns)),
        dot(),
        done("s", 2),
        done("t", 2),
    ).replace("num_partitions=2", "num_partitions=4")
    torus = Machine(TPU, ((0, 0), (0, 1), (1, 0), (1, 1)), latency=0.0)
    check(text, step=2, exposed=0, rows={"s": 0, "t": 0}, machine=torus)
    one_host = Machine(GPU, ((0,),) * 4, latency=0.0)
    check(text, step=4, exposed=2, rows={"s": 0, "t": 2}, machine=one_host)


BODY = parameters(a=MATRIX, x1=array(1), x2=array(2), x3=array(3))
LOOP = '%w = () while(%a), condition=%c, body=%b, backend_config={"known_trip_count":{"n":"5"}}'
CONDITION = computation("c", "ROOT %t = pred[] parameter(0)")


def test_a_loop_multiplies():
    body = computation("b", *BODY, start("s", 3), dot(), done("s", 3))
    found = check(entry(LOOP, before=CONDITION + body), step=15, exposed=5, rows={"s": 1})
    assert [o.trips for o in found.overlaps] == [5]
    assert (found.flops, found.is_exact) == (5 * 2 * 10**9, True)
    assert found.communication_seconds == pytest.approx(15e-3)


def test_loops_in_loops_multiply():
    inner = computation("b", *BODY, start("s", 3), dot(), done("s", 3))
    outer = computation("o", LOOP, dot("e"), *BODY)
    twice = LOOP.replace("%w ", "%v ").replace("%b", "%o").replace('"5"', '"2"')
    text = entry(twice, before=CONDITION + inner + outer)
    found = check(text, step=2 * (15 + 2), exposed=10, rows={"s": 1})
    assert found.overlaps[0].trips == 10


def test_a_loop_of_unknown_length_is_said():
    body = computation("b", *BODY, sync("s", 1))
    text = entry(LOOP.split(", backend")[0], before=CONDITION + body)
    assert not check(text, step=1, exposed=1, rows={"s": 1}).is_exact


def test_a_loops_own_collectives_take_the_link_from_one_under_way():
    # 5 x (1 ms all-reduce, 2 ms product): of 15 ms the link is free for 10.
    loop = CONDITION + computation("b", *BODY, sync("t", 1), dot())
    before, after = start("s", 5), done("s", 5)
    check(entry(before, LOOP, after, before=loop), step=15, exposed=5, rows={"s": 0, "t": 1})
    short = LOOP.replace('"5"', '"1"')  # 1 ms + 2 ms: s has moved for 2 of 5 ms
    check(entry(before, short, after, before=loop), step=6, exposed=4, rows={"s": 3, "t": 1})
    # u waits in line behind s: 4 + 1 ms of its own begin when s and the loop's are through.
    text = entry(before, start("u", 4), short, after, done("u", 4), before=loop)
    check(text, step=10, exposed=8, rows={"s": 3, "u": 4, "t": 1})


def test_of_a_conditional_the_slowest_branch_counts():
    branches = computation("p", *BODY, sync("s", 3)) + computation("q", *BODY, dot(), sync("t", 2))
    choose = "%k = () conditional(%x1, %a, %a), branch_computations={%p, %q}"
    found = check(entry(choose, before=branches), step=4, exposed=2, rows={"s": 3, "t": 2})
    assert {o.op: o.note for o in found.overlaps} == {
        "t": "",
        "s": "in a branch that is not the slowest: not in the predicted time",
    }


def test_a_call_runs_once():
    called = computation("f", *BODY, start("s", 3), dot(), done("s", 3))
    text = entry("%k = () call(%a), to_apply=%f", dot("e"), before=called)
    check(text, step=5, exposed=1, rows={"s": 1})


def test_a_start_whose_done_is_elsewhere_is_exposed_and_said():
    called = computation("f", *BODY, done("s", 3))
    text = entry(start("s", 3), "%k = () call(%s), to_apply=%f", dot(), before=called)
    found = check(text, step=3, exposed=1, rows={"s": 1})
    assert found.overlaps[0].note == "its done is in another computation: counted as exposed"


def test_generic_async_pairs_and_pairs_through_tuples():
    wrapped = computation("wrapped", *BODY, "ROOT " + sync("r", 3))
    text = entry(
        f"%s = ((f32[750000]), {array(3)}) async-start(%x3), calls=%wrapped",
        f"%u = ((f32[750000]), {array(3)}) async-update(%s)",
        dot(),
        f"%d2 = {array(3)} async-done(%u)",
        before=wrapped,
    ).replace("async-update(%s)", "opt-barrier(%s)")
    check(text, step=3, exposed=1, rows={"r": 1})


def fused(name, target=""):
    call = f'ROOT %{name}.c = f32[] custom-call(%{name}.r), custom_call_target="{target}"'
    lines = [sync(f"{name}.r", 3), *([call] if target else [dot(f"{name}.d")])]
    return computation(name, *BODY, *lines)


def test_the_fusions_in_which_xla_for_tpu_runs_a_collective():
    parts = fused("f", "AsyncCollectiveStart") + fused("g") + fused("h", "AsyncCollectiveDone")
    text = entry(
        "%s = (f32[], f32[]) fusion(%x3), kind=kCustom, calls=%f",
        "%e = f32[] get-tuple-element(%s), index=0",
        "%m = (f32[], f32[]) fusion(%e, %a), kind=kOutput, calls=%g",
        "%n = f32[] get-tuple-element(%m), index=0",
        "%d = f32[] fusion(%n), kind=kCustom, calls=%h",
        before=parts,
    )
    found = check(text, step=3, exposed=1, rows={"f.r": 1})
    assert (found.flops, found.overlaps[0].is_async) == (2 * 10**9, True)


def test_a_collective_in_a_fusion_of_its_own():
    text = entry("%m = f32[] fusion(%x3, %a), kind=kCustom, calls=%g", before=fused("g"))
    check(text, step=3, exposed=3, rows={"g.r": 3})


def test_waiting_for_a_copy_is_no_communication():
    # 1e9 bytes read and as many written: 2 ms at the toy's memory.
    big = "f32[250000000]{0}"
    text = entry(
        f"%p = {big} parameter(9)",
        f"%k = ({big}, {big}, u32[]) copy-start(%p)",
        start("s", 1),
        f"%kd = {big} copy-done(%k)",
        done("s", 1),
    )
    check(text, step=2, exposed=0, rows={"s": 0})


def test_what_cannot_be_timed_is_said():
    text = entry('%k = f32[2]{0} custom-call(%x1), custom_call_target="my_send"')
    found = check(text, step=0, exposed=0, rows={"k": 0})
    assert found.overlaps[0].note == "its bytes are not known: counted as no time"


def test_a_kernel_that_sends_computes_meanwhile():
    """3 MB go round, 1 ms each, while it writes 2 GB of memory: 2 ms."""
    line = '%k = f32[500000000]{0} custom-call(), custom_call_target="tpu_custom_call"'
    text, groups = entry(line), groups_of_block([(2, True)])
    torus = Machine(TPU, ((0,), (1,)), latency=0.0)
    found = schedule(text, machine=torus, sends={"k": (3 * 10**6, groups)})
    (row,) = found.overlaps
    assert (row.kind, row.wire_bytes, row.note) == ("remote-dma", 3 * 10**6, "")
    assert [row.seconds, row.exposed_seconds, found.seconds] == ms(3, 1, 3)
    assert found.bytes == 2 * 10**9


def test_latency_counts_for_each_step_of_the_ring():
    slow = Machine(GPU, ((0,), (0,)), latency=1e-3)
    check(entry(sync("s", 1)), step=3, exposed=3, rows={"s": 3}, machine=slow)


def test_without_a_machine_only_work_is_counted():
    found = schedule(entry(start("s", 3), dot(), done("s", 3), sync("t", 1)))
    assert (found.seconds, found.hidden, found.communication_seconds) == (None, None, None)
    assert [(o.flops, o.hidden, o.seconds) for o in found.overlaps] == [
        (2 * 10**9, None, None),
        (0, None, None),
    ]


def test_a_value_defined_by_itself_ends():
    fused = computation("f", "ROOT %l = f32[1] copy(%l)")
    assert schedule(entry("%k = f32[1] fusion(), calls=%f", before=fused)).bytes == 4


@pytest.mark.parametrize(
    "text, says",
    [
        (HEAD.replace(", is_scheduled=true", "") + computation("f", dot()), "needs a scheduled"),
        (HEAD + computation("f", dot()), "needs a module with an ENTRY computation"),
        (2 * entry(dot()), "text of one HLO module, but got 2"),
        ("", "text of one HLO module, but got 0"),
        (entry(dot().replace("%a, %a", "%lost, %a")), "d needs two operands that are defined"),
        (entry("%k = () call(%a), to_apply=%f",
               before=computation("f", "%l = () call(), to_apply=%f")), "f runs itself"),
        (entry("%k = f32[] fusion(%x1), calls=%f",
               before=computation("f", "%l = f32[] fusion(), calls=%f")), "runs itself: the text"),
    ],
)  # fmt: skip
def test_what_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        schedule(text, machine=TWO)


def test_what_xla_computes_anew_is_counted():
    """Its rematerialisation pass names a copy after the original; a scope of that name is none."""
    text = """HloModule m, is_scheduled=true
ENTRY %e (x: f32[8,4]) -> f32[8,8] {
  %x = f32[8,4]{1,0} parameter(0)
  %d.1 = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %d.1.remat = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %d.1.remat2.1 = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %d.remats = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %a = f32[8,8]{1,0} add(%d.1, %d.1.remat)
  ROOT %r = f32[8,8]{1,0} add(%a, %d.1.remat2.1)
}
"""
    found = schedule(text)
    assert found.flops == 4 * 2 * 8 * 8 * 4
    assert found.remade_flops == 2 * 2 * 8 * 8 * 4
