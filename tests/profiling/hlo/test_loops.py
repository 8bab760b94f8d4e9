"""Trip counts that the compiler does not print, read from the loops themselves."""

import pytest

from txcore.profiling.hlo import find_collectives

# The form that XLA for TPU prints; the bound is a constant of the condition.
TEXT = """HloModule m, is_scheduled=true, num_partitions=2
%body (p: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %one = s32[] constant(1)
  %p = (s32[], f32[8]{0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %n = s32[] get-tuple-element(%p), index=2
  %next = s32[] add(%i, %one)
  %sum = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  ROOT %t = (s32[], f32[8]{0}, s32[]) tuple(%next, %sum, %n)
}

%condition (q: (s32[], f32[8], s32[])) -> pred[] {
  %q = (s32[], f32[8]{0}, s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %m = s32[] get-tuple-element(%q), index=2
  %last = s32[] constant(7)
  ROOT %lt = pred[] compare(%j, %last), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %first = s32[] copy(%zero)
  %five = s32[] constant(5)
  %init = (s32[], f32[8]{0}, s32[]) tuple(%first, %x, %five)
  %loop = (s32[], f32[8]{0}, s32[]) while(%init), condition=%condition, body=%body
  ROOT %r = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def trips(*changes):
    text = TEXT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (op,) = find_collectives(text)
    return (op.trips.count, op.trips.known)


def test_a_counter_up_to_a_constant():
    assert trips() == (7, True)
    assert trips(("%zero = s32[] constant(0)", "%zero = s32[] constant(3)")) == (4, True)
    assert trips(("%zero = s32[] constant(0)", "%zero = s32[] constant(9)")) == (0, True)
    assert trips(("add(%i, %one)", "add(%one, %i)")) == (7, True)


def test_a_bound_that_the_loop_carries():
    assert trips(("compare(%j, %last)", "compare(%j, %m)")) == (5, True)


def test_the_compilers_own_count_goes_first():
    known = 'body=%body, backend_config={"known_trip_count":{"n":"11"}}'
    assert trips(("body=%body", known)) == (11, True)


@pytest.mark.parametrize(
    "old, new",
    [
        ("direction=LT", "direction=NE"),
        ("compare(%j, %last)", "compare(%j)"),
        ("get-tuple-element(%q), index=0", "get-tuple-element(), index=0"),
        ("compare(%j, %last)", "compare(%last, %j)"),
        ("%one = s32[] constant(1)", "%one = s32[] constant(2)"),
        ("add(%i, %one)", "multiply(%i, %one)"),
        ("tuple(%next, %sum, %n)", "tuple(%i, %sum, %n)"),
        ("%zero = s32[] constant(0)", "%zero = s32[] parameter(1)"),
        ("tuple(%first, %x, %five)", "parameter(2)"),
        ("condition=%condition", "condition=%lost"),
        ("%first = s32[] copy(%zero)", "%first = s32[] copy(%first)"),
    ],
)
def test_any_other_loop_is_unknown(old, new):
    assert trips((old, new)) == (1, False)


def test_a_carried_bound_that_changes_is_unknown():
    carried = ("compare(%j, %last)", "compare(%j, %m)")
    assert trips(carried, ("tuple(%next, %sum, %n)", "tuple(%next, %sum, %i)")) == (1, False)
    assert trips(carried, ("%five = s32[] constant(5)", "%five = s32[] parameter(1)")) == (1, False)
