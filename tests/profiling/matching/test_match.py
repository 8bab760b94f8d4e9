"""The one-to-one match, on hand-made HLO and hand-made declarations: every fate, every refusal."""

import dataclasses

import pytest

from txcore.profiling.declared.collectives import Declared
from txcore.profiling.hlo import find_collectives, sort_groups
from txcore.profiling.matching.match import match_collectives
from txcore.profiling.matching.rows import rows_of

ALL = sort_groups([(0, 1, 2, 3)])
SIZES = ((("data", 4),),)
COMMON = "channel_id=1, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add"


def declare(tag, elements, **changes):
    """Declare a psum of float32 over the one axis."""
    base = Declared(
        kind="all-reduce", primitive="psum", axes=("data",), group_size=4, dtype="float32",
        payload_bytes=4 * elements, trips=1, tag=tag, source="step.py:1", autodiff=False,
        elements=elements, groups=ALL, operand=hash((tag, elements)),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def line(kind, types, operands, said="", more="", name="c"):
    """Write a collective; its operands are parameters p0, p1, ... of the given types."""
    result = types[0] if len(types) == 1 else f"({', '.join(types)})"
    return f"  %{name} = {result} {kind}({', '.join(operands)}), {COMMON}{more}{said}"


def said(tag=None, op="jit(f)/shard_map/psum", mark=False):
    pairs = ([f'txcore="{tag}"'] if tag else []) + (['is_spmd_generated="true"'] if mark else [])
    attributes = f", frontend_attributes={{{','.join(pairs)}}}" if pairs else ""
    return f'{attributes}, metadata={{op_name="{op}"}}'


def module(*lines, parameters=("f32[8]", "f32[4]", "f32[2]"), extra=""):
    given = [f"  %p{i} = {t} parameter({i})" for i, t in enumerate(parameters)]
    header = "HloModule m, num_partitions=4\n"
    return (
        header + extra + "ENTRY %main (x: f32[8]) -> f32[8] {\n" + "\n".join(given + [*lines, "}"])
    )


def audited(text, declared, marks=True):
    ops = find_collectives(text)
    matched = match_collectives(ops, declared, marks=marks)
    return rows_of(ops, matched, declared, SIZES)


def fates(text, declared, **options):
    rows, found = audited(text, declared, **options)
    return [f.fates for f in found], [row.explained for row in rows]


def loop(body_lines, trips):
    """A while loop around lines, which runs `trips` times."""
    body = "\n".join(
        ["%body (x: f32[8]) -> f32[8] {", "  %p0 = f32[8] parameter(0)", *body_lines, "}"]
    )
    config = f'backend_config={{"known_trip_count":{{"n":"{trips}"}}}}' if trips else ""
    call = f"  %w = f32[8] while(%p0), condition=%cond, body=%body, {config}"
    return call, body + "\n\n"


A = line("all-reduce", ["f32[8]"], ["%p0"], said("psum/a"))
UNTAGGED = line("all-reduce", ["f32[8]"], ["%p0"], said())


def test_kept():
    rows, found = audited(module(A), [declare("psum/a", 8)])
    assert found[0].fates == ("kept",)
    assert found[0].rows == (0,)
    (row,) = rows
    assert (row.origin, row.tags, row.axes, row.source, row.op) == (
        "txcore", ("psum/a",), ("data",), "step.py:1", "c",
    )  # fmt: skip
    (part,) = row.parts
    assert (part.tag, part.elements, part.payload_bytes, part.fates) == ("psum/a", 8, 32, ("kept",))


@pytest.mark.parametrize(
    "change",
    [{"elements": 9}, {"kind": "all-to-all"}, {"groups": ((0, 1), (2, 3))}, {"trips": 0}],
)  # fmt: skip
def test_whatever_differs_is_no_match(change):
    rows, found = audited(
        module(A), [dataclasses.replace(declare("psum/a", 8), **change)], marks=False
    )
    assert not rows[0].explained
    assert rows[0].origin == "partitioner"
    assert "the traced program does not declare it" in rows[0].note
    assert found[0].rows == ()


@pytest.mark.parametrize("tag", ["psum/b", None])
def test_a_program_from_a_cache_keeps_the_names_of_who_compiled_it(tag):
    rows, found = audited(module(A), [declare(tag, 8)], marks=False)
    assert (rows[0].explained, rows[0].origin) == (True, "txcore" if tag else "user")
    assert (rows[0].note, found[0].fates) == ("compiled under the name psum/a", ("kept",))


TWO = [declare("psum/a", 8), declare("psum/b", 8)]


def test_another_name_that_this_trace_has_too_is_no_match():
    rows, found = audited(
        module(A, A.replace("%c ", "%d ")), [declare(t, 8) for t in ("psum/a", "psum/b")]
    )
    assert [row.explained for row in rows] == [True, False]
    assert found[1].rows == ()


def test_the_second_of_two_that_are_declared_once_is_too_much():
    text = module(A, A.replace("%c ", "%d "))
    assert fates(text, [declare("psum/a", 8)]) == ([("kept",)], [True, False])


def test_a_mark_beats_a_tag():
    marked = line("all-reduce", ["f32[8]"], ["%p0"], said("psum/a", mark=True))
    rows, found = audited(module(marked), [declare("psum/a", 8)])
    assert (rows[0].origin, rows[0].explained) == ("partitioner", False)
    assert found[0].fates == ("missing",)


def combined(*elements_said, op_said=""):
    types = ["f32[8]", "f32[4]"]
    elements = [
        f"  %g{i} = {types[i]} get-tuple-element(%c), index={i}{s}"
        for i, s in enumerate(elements_said)
    ]
    return module(line("all-reduce", types, ["%p0", "%p1"], op_said), *elements)


def test_combined_arrays_are_told_apart_by_their_own_words():
    text = combined(said("psum/a"), said("psum/b"), op_said=said("psum/a,psum/b"))
    both = [declare("psum/a", 8), declare("psum/b", 4, source="step.py:2")]
    rows, found = audited(text, both)
    (row,) = rows
    assert [f.fates for f in found] == [("combined",), ("combined",)]
    assert [(p.tag, p.source, p.payload_bytes) for p in row.parts] == [
        ("psum/a", "step.py:1", 32), ("psum/b", "step.py:2", 16),
    ]  # fmt: skip
    assert (row.tags, row.payload_bytes) == (("psum/a", "psum/b"), 48)


def test_a_users_merged_with_the_partitioners_is_told_apart():
    text = combined(
        said("psum/a"), said(mark=True, op="jit(f)/dot_general"), op_said=said("psum/a", mark=True)
    )
    rows, found = audited(text, [declare("psum/a", 8)])
    assert [(r.origin, r.explained, r.payload_bytes) for r in rows] == [
        ("txcore", True, 32), ("partitioner", False, 16),
    ]  # fmt: skip
    assert {r.op for r in rows} == {"c"}
    assert found[0].rows == (0,)


def test_a_marked_merge_without_own_words_leaves_the_surplus_to_the_partitioner():
    text = combined("", "", op_said=said("psum/a", mark=True))
    rows, _ = audited(text, [declare("psum/a", 8)])
    assert [(r.origin, r.payload_bytes) for r in rows] == [("txcore", 32), ("partitioner", 16)]


def test_a_marked_merge_all_of_which_is_declared_is_still_marked():
    text = combined("", "", op_said=said("psum/a,psum/b", mark=True))
    rows, _ = audited(text, [declare("psum/a", 8), declare("psum/b", 4)])
    assert [r.explained for r in rows] == [False]


FLAT = "\n".join([
    "%join (a: f32[8], b: f32[4]) -> f32[12] {",
    "  %a = f32[8]{0} parameter(0)",
    "  %b = f32[4]{0} parameter(1)",
    "  ROOT %j = f32[12]{0} concatenate(%a, %b), dimensions={0}",
    "}\n\n",
])  # fmt: skip
JOIN = "  %flat = f32[12]{0} fusion(%p0, %p1), kind=kLoop, calls=%join"


def flat(op_said, *slices):
    cut = [
        f"  %s{i} = f32[{end - start}]{{0}} slice(%c), slice={{[{start}:{end}]}}{s}"
        for i, (start, end, s) in enumerate(slices)
    ]
    return module(JOIN, line("all-reduce", ["f32[12]"], ["%flat"], op_said), *cut, extra=FLAT)


def test_a_concatenation_by_the_compiler_is_taken_apart():
    text = flat(said("psum/a,psum/b"), (0, 8, said("psum/a")), (8, 12, said("psum/b")))
    rows, found = audited(text, [declare("psum/a", 8), declare("psum/b", 4)])
    assert [f.fates for f in found] == [("combined",), ("combined",)]
    assert [p.payload_bytes for p in rows[0].parts] == [32, 16]


def test_a_concatenation_that_is_declared_as_such_is_one_array():
    text = flat(said("psum/bucket"), (0, 8, said("psum/bucket")), (8, 12, said("psum/bucket")))
    rows, found = audited(text, [declare("psum/bucket", 12)])
    assert found[0].fates == ("kept",)
    assert len(rows[0].parts) == 1


def test_a_concatenation_with_a_piece_too_many():
    text = flat(said("psum/a"), (0, 8, said("psum/a")), (8, 12, said(op="jit(f)/dot_general")))
    rows, _ = audited(text, [declare("psum/a", 8)])
    assert [(r.origin, r.payload_bytes) for r in rows] == [("txcore", 32), ("partitioner", 16)]


def test_a_flat_array_without_visible_pieces_is_matched_by_its_sum():
    text = module(line("all-reduce", ["f32[12]"], ["%p0"], said("psum/a,psum/b")),
                  parameters=["f32[12]"])  # fmt: skip
    rows, found = audited(text, [declare("psum/a", 8), declare("psum/b", 4)])
    assert [f.fates for f in found] == [("combined",), ("combined",)]
    assert [(p.tag, p.payload_bytes) for p in rows[0].parts] == [("psum/a", 32), ("psum/b", 16)]
    assert fates(text, [declare("psum/a", 8), declare("psum/b", 3)])[1] == [False]


def test_split():
    parts = [line("all-reduce", [f"f32[{n}]"], [f"%p{i}"], said("psum/a"), name=f"c{i}")
             for i, n in enumerate((8, 4))]  # fmt: skip
    rows, found = audited(module(*parts), [declare("psum/a", 12)])
    assert found[0].fates == ("split",)
    assert found[0].rows == (0, 1)
    assert sum(r.payload_bytes for r in rows) == 48
    assert not all(fates(module(*parts), [declare("psum/a", 13)])[1])


def test_promoted():
    text = module(line("all-reduce", ["f32[8]"], ["%p0"], said("psum/a")))
    rows, found = audited(text, [declare("psum/a", 8, dtype="bfloat16", payload_bytes=16)])
    assert found[0].fates == ("promoted",)
    assert (rows[0].dtype, rows[0].wire_dtype) == ("bfloat16", "float32")
    assert (rows[0].payload_bytes, rows[0].wire_bytes) == (16, 48)


def test_a_loop_as_declared():
    call, body = loop([A], 5)
    rows, found = audited(module(call, extra=body), [declare("psum/a", 8, trips=5)])
    assert (found[0].fates, rows[0].trips) == (("kept",), 5)


def test_hoisted():
    assert fates(module(A), [declare("psum/a", 8, trips=5)]) == ([("hoisted",)], [True])


def test_a_hoisted_one_leaves_no_room_for_another_in_the_loop():
    call, body = loop([A], 4)
    text = module(call, A.replace("%c ", "%d "), extra=body)
    assert fates(text, [declare("psum/a", 8, trips=5)])[1] == [True, True]  # peeled: 4 + 1
    assert sorted(fates(text, [declare("psum/a", 8, trips=9)])[1]) == [False, True]
    assert sorted(fates(text, [declare("psum/a", 8, trips=4)])[1]) == [False, True]


def test_unrolled():
    call, body = loop([A, A.replace("%c ", "%d ")], 3)
    text = module(call, extra=body)
    assert fates(text, [declare("psum/a", 8, trips=6)]) == ([("unrolled",)], [True, True])
    assert fates(text, [declare("psum/a", 8, trips=7)])[1] == [True, False]


def test_more_trips_than_declared_are_too_many():
    call, body = loop([A], 5)
    assert fates(module(call, extra=body), [declare("psum/a", 8, trips=4)])[1] == [False]


def test_a_loop_whose_length_only_the_traced_program_has():
    call, body = loop([A], None)
    rows, _ = audited(module(call, extra=body), [declare("psum/a", 8, trips=5)])
    assert (rows[0].trips, rows[0].trips_known) == (5, True)


def test_deduplicated_where_the_operands_are_equal():
    twins = [declare("psum/a", 8, operand=1), declare("psum/b", 8, operand=1)]
    assert fates(module(A), twins)[0] == [("kept",), ("deduplicated",)]


def test_the_sum_of_two_reductions_may_be_taken_first():
    assert fates(module(A), [declare("psum/a", 8), declare("psum/b", 8)])[0] == [
        ("kept",), ("reassociated",),
    ]  # fmt: skip
    exchanges = [declare("psum/a", 8, kind="all-to-all"), declare("x", 8, kind="all-to-all")]
    assert fates(module(A), exchanges)[0] == [("missing",), ("missing",)]


def test_dead_and_constant_ones_are_eliminated():
    gone = [declare("psum/b", 4, live=False), declare("psum/c", 2, foldable=True)]
    assert fates(module(A), [declare("psum/a", 8), *gone])[0] == [
        ("kept",), ("eliminated",), ("eliminated",),
    ]  # fmt: skip


def test_a_dead_one_that_is_kept_explains_only_itself():
    dead = declare("psum/a", 8, live=False)
    assert fates(module(A), [dead]) == ([("kept",)], [True])
    # In a shard_map that leaves axes to a partitioner which does not mark its work, it may be his.
    partial = dataclasses.replace(dead, size_known=False)
    assert fates(module(A), [partial], marks=False)[1] == [False]


def test_a_double_explains_nothing_where_the_partitioner_does_not_mark_its_work():
    twins = [declare("psum/a", 8, operand=1, size_known=False)] * 2
    text = module(A, A.replace("%c ", "%d "))
    assert fates(text, twins, marks=True)[1] == [True, True]
    assert fates(text, twins, marks=False) == ([("kept",), ("deduplicated",)], [True, False])


def test_rewritten():
    scatter = line(
        "reduce-scatter", ["f32[8]"], ["%p0"], said("psum/a", op="f/psum"), ", dimensions={0}"
    )
    assert fates(module(scatter), [declare("psum/a", 8)]) == ([("rewritten",)], [True])
    permute = declare("psum/a", 8, kind="all-to-all")
    assert fates(module(scatter), [permute])[1] == [False]


def test_sharded_further_under_axes_left_to_the_partitioner():
    partial = declare("psum/a", 32, size_known=False)
    rows, found = audited(module(A), [partial])
    assert (found[0].fates, rows[0].payload_bytes) == (("kept",), 32)
    assert fates(module(A), [dataclasses.replace(partial, elements=12)])[1] == [False]
    assert fates(module(A), [dataclasses.replace(partial, size_known=True)])[1] == [False]


def test_an_array_may_lose_its_tag_only_where_the_compiler_marks_its_own():
    assert fates(module(UNTAGGED), [declare("psum/a", 8)], marks=True)[1] == [True]
    assert fates(module(UNTAGGED), [declare("psum/a", 8)], marks=False)[1] == [False]


def test_untagged_ones_match_untagged_declarations():
    assert fates(module(UNTAGGED), [declare(None, 8)], marks=False)[1] == [True]


def test_a_line_that_looks_otherwise_than_its_match_says_so():
    backward = line("all-reduce", ["f32[8]"], ["%p0"], said(op="jit(f)/transpose(jvp())/psum"))
    rows, _ = audited(module(backward), [declare(None, 8)])
    assert (rows[0].origin, rows[0].note) == ("user", "its own line looks like autodiff")


def test_of_two_lines_each_finds_the_declaration_of_its_own_source():
    header = 'FileNames\n1 "/home/x/step.py"\n\nFunctionNames\n1 "f"\n\nFileLocations\n'
    header += "".join(f"{i} {{file_name_id=1 function_name_id=1 line={i}}}\n" for i in (1, 2))
    header += "\nStackFrames\n" + "".join(f"{i} {{file_location_id={i}}}\n" for i in (1, 2))
    at = ', metadata={{op_name="jit(f)/shard_map/psum" stack_frame_id={}}}'
    lines = [line("all-reduce", ["f32[8]"], ["%p0"], at.format(i), name=f"c{i}") for i in (2, 1)]
    two = [declare(None, 8, source=f"step.py:{i}", operand=i) for i in (1, 2)]
    _, found = audited(module(*lines, extra=header + "\n"), two)
    assert [f.rows for f in found] == [(1,), (0,)]


def test_narrowed():
    text = module(line("all-reduce", ["bf16[8]"], ["%p0"], said("psum/a")), parameters=["bf16[8]"])
    rows, found = audited(text, [declare("psum/a", 8)])
    assert found[0].fates == ("narrowed",)
    assert (rows[0].payload_bytes, rows[0].wire_bytes) == (32, 24)
