"""One small hand-made module for each form that XLA prints, with its expected reading."""

import time

import pytest

from txcore.profiling.hlo import HloError, find_collectives, parse_shapes, read_modules
from txcore.profiling.hlo.read_groups import parse_groups, parse_pairs

ROWS = ((0, 1), (2, 3))
COLUMNS = ((0, 2), (1, 3))


def module(body, *, before="", partitions=4):
    return (
        f"HloModule m, is_scheduled=true, num_partitions={partitions}\n\n{before}\n"
        "ENTRY %main (x: f32[8,4]) -> f32[8,4] {\n"
        "  %x = f32[8,4]{1,0} parameter(0)\n"
        "  %y = bf16[6]{0} parameter(1)\n"
        f"{body}\n}}\n"
    )


@pytest.mark.parametrize(
    "text, groups",
    [
        ("{{0,1},{2,3}}", ROWS),
        ("{{3,2},{1,0}}, use_global_device_ids=true", ROWS),
        ("{}", ()),
        ("{{0},{1},{2},{3}}", ((0,), (1,), (2,), (3,))),
        ("[2,2]<=[4]", ROWS),
        ("[2,2]<=[2,2]T(1,0)", COLUMNS),
        ("[1,4]<=[4], dimensions={0}", ((0, 1, 2, 3),)),
        ("mesh['data'=2,'model'=2] {'model'}", ROWS),
        ("mesh['data'=2,'model'=2] {'data'}, use_global_device_ids=true", COLUMNS),
        ("mesh[data=2,model=2] {data}", COLUMNS),
        ('mesh["data"=2,"model"=2] {"data","model"}', ((0, 1, 2, 3),)),
        ("mesh['data'=2,'model'=2] {}", ((0,), (1,), (2,), (3,))),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", COLUMNS),
        ("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", COLUMNS),
        ("mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2,1]T(1,0,2)) {'b'}", ((0, 1), (2, 3))),
        ("mesh['a'=4] {'a':(1)2}", COLUMNS),
        ("mesh['a'=4] {'a':(2)2}", ROWS),
        ("mesh[a=4] {a:(1)2,a:(2)2}", ((0, 1, 2, 3),)),
    ],
)
def test_replica_groups(text, groups):
    assert tuple(parse_groups(text)) == groups


@pytest.mark.parametrize(
    "text",
    [
        "",
        "none",
        "{{0,1},{1,2}}",
        "[2,3]<=[4]",
        "[2,2]<=[2,2]T(0,0)",
        "[2,2]<=[99999999999]",
        "mesh['a'=2] {'b'}",
        "mesh[] {}",
        "mesh['a'=4] {'a':(3)2}",
        "mesh['a'=4], device_ids=(0,0,1,2) {'a'}",
    ],
)
def test_replica_groups_that_contradict_themselves_are_refused(text):
    with pytest.raises(HloError):
        parse_groups(text)


def test_pairs():
    assert parse_pairs("{{0,1},{1,0}}, metadata={}") == ((0, 1), (1, 0))
    assert parse_pairs("{}") == ()
    with pytest.raises(HloError):
        parse_pairs("{{0,1,2}}")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("f32[8,4]{1,0}", [("float32", (8, 4), 128)]),
        ("bf16[8]{0:T(8,128)(2,1)S(1)}", [("bfloat16", (8,), 16)]),
        ("(f32[], /*index=1*/pred[3], (s8[2], u32[]))",
         [("float32", (), 4), ("bool", (3,), 3), ("int8", (2,), 2), ("uint32", (), 4)]),
        ("f8e4m3fn[16]", [("float8_e4m3fn", (16,), 16)]),
        ("s4[3]", [("int4", (3,), 2)]),
        ("c64[2]", [("complex64", (2,), 16)]),
        ("f32[<=8]", [("float32", (8,), 32)]),
    ],
)  # fmt: skip
def test_types(text, expected):
    assert [(s.dtype, s.dims, s.bytes) for s in parse_shapes(text)] == expected


REPLICAS = "channel_id=1, replica_groups={{0,1},{2,3}}, use_global_device_ids=true"


@pytest.mark.parametrize(
    "line, kind, elements",
    [
        (f"%r = f32[8,4]{{1,0}} all-reduce(%x), {REPLICAS}, to_apply=%add", "all-reduce", 32),
        (f"ROOT %r = f32[16,4]{{1,0}} all-gather(%x), {REPLICAS}, dimensions={{0}}",
         "all-gather", 64),
        (f"%r = f32[4,4]{{1,0}} reduce-scatter(%x), {REPLICAS}, to_apply=%add",
         "reduce-scatter", 32),
        (f"%r = (f32[8,4]{{1,0}}, bf16[6]{{0}}) all-reduce(%x, %y), {REPLICAS}, to_apply=%add",
         "all-reduce", 38),
        (f"%r = (f32[8,4], /*index=1*/f32[8,4]) all-to-all(%x, %x), {REPLICAS}",
         "all-to-all", 64),
        (f"%r = f32[8,4] all-to-all(f32[8,4]{{1,0}} %x), {REPLICAS}", "all-to-all", 32),
        ("%r = f32[8,4] collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}",
         "collective-permute", 32),
        (f"%r = f32[8,4] collective-broadcast(%x), {REPLICAS}", "collective-broadcast", 32),
        (f"%r = f32[8,4] ragged-all-to-all(%x, %x, %y, %y, %y, %y), {REPLICAS}",
         "ragged-all-to-all", 32),
        ("%r = (f32[8,4], u32[], token[]) send(%x, %t), channel_id=3", "send", 32),
    ],
)  # fmt: skip
def test_every_kind_is_counted_by_its_operands(line, kind, elements):
    (op,) = find_collectives(module(f"  {line}"))
    assert (op.kind, op.elements, op.problem) == (kind, elements, "")


ASYNC_PAIRS = {
    "all-reduce": f"""
  %s = f32[8,4]{{1,0}} all-reduce-start(%x), {REPLICAS}, to_apply=%add
  %d = f32[8,4]{{1,0}} all-reduce-done(%s)""",
    "all-gather": f"""
  %s = (f32[8,4]{{1,0}}, f32[16,4]{{1,0}}) all-gather-start(%x), {REPLICAS}, dimensions={{0}}
  %d = f32[16,4]{{1,0}} all-gather-done(%s)""",
    "collective-permute": """
  %s = (f32[8,4], f32[8,4], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %d = f32[8,4] collective-permute-done(%s)""",
    "reduce-scatter": f"""
  %s = ((f32[8,4]{{1,0}}), f32[4,4]{{1,0}}) reduce-scatter-start(%x), {REPLICAS}, to_apply=%add
  %d = f32[4,4]{{1,0}} reduce-scatter-done(%s)""",
}


@pytest.mark.parametrize("kind", ASYNC_PAIRS)
def test_an_async_pair_counts_once(kind):
    (op,) = find_collectives(module(ASYNC_PAIRS[kind]))
    assert (op.kind, op.elements) == (kind, 64 if kind == "all-gather" else 32)


WRAPPED = f"""
%wrapped (p: f32[8,4]) -> f32[4,4] {{
  %p = f32[8,4]{{1,0}} parameter(0)
  ROOT %rs = f32[4,4]{{1,0}} reduce-scatter(%p), {REPLICAS}, to_apply=%add
}}
"""


@pytest.mark.parametrize(
    "body",
    [
        """  %s = ((f32[8,4]), f32[4,4], u32[]) async-start(%x), calls=%wrapped
  %u = ((f32[8,4]), f32[4,4], u32[]) async-update(%s), calls=%wrapped
  ROOT %d = f32[4,4] async-done(%s), calls=%wrapped""",
        """  %s = ((f32[8,4]), f32[4,4]) reduce-scatter-start(%x), calls=%wrapped
  ROOT %d = f32[4,4] reduce-scatter-done(%s), calls=%wrapped""",
        """  %s = ((f32[8,4]), f32[4,4]) call-start(%x), to_apply=%wrapped
  ROOT %d = f32[4,4] call-done(%s)""",
        """  %s = ((f32[8,4]), f32[4,4]) fusion-start(%x), kind=kCustom, calls=%wrapped
  ROOT %d = f32[4,4] fusion-done(%s)""",
        "  ROOT %d = f32[4,4] fusion(%x), kind=kCustom, calls=%wrapped",
        "  ROOT %d = f32[4,4] call(%x), to_apply=%wrapped",
        "  ROOT %d = f32[4,4] conditional(%c, %x, %x), branch_computations={%wrapped, %other}",
        "  ROOT %d = f32[4,4] conditional(%c, %x, %x), true_computation=%wrapped, "
        "false_computation=%other",
    ],
)
def test_a_wrapped_collective_counts_once(body):
    (op,) = find_collectives(module(body, before=WRAPPED))
    assert (op.kind, op.elements, op.trips.count) == ("reduce-scatter", 32, 1)


def loop(name, callee, config):
    return (
        f"%{name} (p: f32[8,4]) -> f32[8,4] {{\n  %p = f32[8,4] parameter(0)\n"
        f"  ROOT %w = f32[8,4] while(%p), condition=%cond, body=%{callee}{config}\n}}\n"
    )


BODY = f"""
%body (p: f32[8,4]) -> f32[8,4] {{
  %p = f32[8,4] parameter(0)
  ROOT %r = f32[8,4] all-reduce(%p), {REPLICAS}, to_apply=%add
}}
"""


@pytest.mark.parametrize(
    "config, trips, known",
    [
        (', backend_config={"known_trip_count":{"n":"7"},"x":{"n":"2"}}', 7, True),
        (r', backend_config="{\"known_trip_count\":{\"n\":\"7\"}}"', 7, True),
        ("", 1, False),
    ],
)
def test_a_loop_multiplies(config, trips, known):
    (op,) = find_collectives(
        module(f"  ROOT %w = f32[8,4] while(%x), condition=%cond, body=%body{config}", before=BODY)
    )
    assert (op.trips.count, op.trips.known) == (trips, known)


def test_nested_loops_and_repeated_calls_multiply_and_add():
    five = ', backend_config={"known_trip_count":{"n":"5"}}'
    three = ', backend_config={"known_trip_count":{"n":"3"}}'
    text = module(
        f"  %a = f32[8,4] while(%x), condition=%cond, body=%outer{five}\n"
        "  ROOT %b = f32[8,4] call(%a), to_apply=%body",
        before=BODY + loop("outer", "body", three),
    )
    (op,) = find_collectives(text)
    assert op.trips.count == 5 * 3 + 1


def test_a_module_that_calls_itself_ends():
    find_collectives(module("  ROOT %w = f32[8,4] call(%x), to_apply=%a",
                            before=loop("a", "b", "") + loop("b", "a", "")))  # fmt: skip


def test_witnesses():
    line = (
        f"  %r = f32[8,4] all-reduce(%x), {REPLICAS}, to_apply=%add, "
        'frontend_attributes={is_spmd_generated="true",note="a \\"quoted\\" }",'
        'txcore="psum/a,psum/b"}, '
        'metadata={op_name="jit(f)/shard_map/psum" source_file="/u/train.py" source_line=12}'
    )
    (op,) = find_collectives(module(line))
    assert op.tags == ("psum/a", "psum/b")
    assert op.marked
    assert op.op_name == "jit(f)/shard_map/psum"
    assert op.frames == (("/u/train.py", 12),)


def test_the_mark_is_read_from_frontend_attributes_only():
    config = ', backend_config={"is_spmd_generated":true,"is_spmd_generated":"true"}'
    (op,) = find_collectives(module(f"  %r = f32[8,4] all-reduce(%x), {REPLICAS}{config}"))
    assert not op.marked


TABLES = """
FileNames
1 "/u/lib.py"
2 "/u/train.py"

FunctionNames
1 "all-reduce(broken"

FileLocations
1 {file_name_id=1 function_name_id=1 line=5 end_line=5 column=0 end_column=0}
2 {file_name_id=2 function_name_id=1 line=30 end_line=30 column=0 end_column=0}

StackFrames
"""


@pytest.mark.parametrize(
    "frames",
    [
        # As printed today, each parent's number plus one (1: none); and the plain old way.
        "1 {file_location_id=2 parent_frame_id=1}\n2 {file_location_id=1 parent_frame_id=2}\n",
        "1 {file_location_id=2 parent_frame_id=0}\n2 {file_location_id=1 parent_frame_id=1}\n",
        "1 {file_location_id=2}\n2 {file_location_id=1 parent_frame_id=1}\n",
    ],
)
def test_stack_frame_tables(frames):
    line = f"  %r = f32[8,4] all-reduce(%x), {REPLICAS}, metadata={{stack_frame_id=2}}"
    (op,) = find_collectives(module(line, before=TABLES + frames))
    assert op.frames == (("/u/lib.py", 5), ("/u/train.py", 30))


def test_stack_frames_in_a_circle_end():
    circle = "1 {file_location_id=2 parent_frame_id=3}\n2 {file_location_id=1 parent_frame_id=2}\n"
    line = f"  %r = f32[8,4] all-reduce(%x), {REPLICAS}, metadata={{stack_frame_id=2}}"
    (op,) = find_collectives(module(line, before=TABLES + circle))
    assert len(op.frames) == 2


@pytest.mark.parametrize(
    "line, problem",
    [
        ("%r = f32[8,4 all-reduce(%x), replica_groups={}", "cannot be read"),
        ("%r = f32[8,4] all-reduce(%x), replica_groups={{0,1}", "unknown replica groups"),
        ("%r = f32[8,4] all-reduce(%x), channel_id=1", "no replica_groups"),
        ("%r = f32[8,4] all-reduce(%gone), replica_groups={}", "'%gone' is not defined"),
        ("%r = f32[8,4] all-reduce(), replica_groups={}", "no operands"),
        ("%r = f32[8,4] all-reduce(%x, replica_groups={}", "do not end"),
        ("%r = f32[8,4] all-reduce(q99[4] %x), replica_groups={}", "unknown element type 'q99'"),
        ("%r = f32[8,4] all-reduse(%x), replica_groups={{0,1}}", "unknown form"),
        ("%r = f32[8,4] all-gather-done(%x)", "unknown form"),
        ("%r = (f32[8,4] all-to-all(%x), replica_groups={}", "cannot be read"),
        ("%r = f32[8,4] all-red", "cannot be read"),
        ("%r = f32[8", "cannot be read"),
        ('ROOT %r"x = f32[8,4] all-reduce(%x), metadata={op_name="a"}', "cannot be read"),
        ("r/ f32[8,4] all-re(%x), replica_groups={{0,1}}", "cannot be read"),
    ],
)
def test_what_looks_like_a_collective_and_cannot_be_read_is_unknown(line, problem):
    (op,) = find_collectives(module(f"  {line}"))
    assert op.kind == "unknown"
    assert problem in op.problem


def test_text_that_only_names_a_collective_is_none():
    body = (
        f"  %r = f32[8,4] all-reduce(%x), {REPLICAS}, to_apply=%add\n"
        "  %g = f32[8,4] get-tuple-element(%all-reduce.1), index=0\n"
        "  %b = b(f32[8,4]{1,0}) copy(%x)\n"
        "  %l = s32[2,2] constant({ { 1, 2 },\n  { 3, 4 } })\n"
        '  %c = f32[8,4] copy(%r), metadata={op_name="all-reduce(x), replica-groups"}'
    )
    assert len(find_collectives(module(body))) == 1


@pytest.mark.parametrize(
    "target, config, is_opaque",
    [
        ("TopK", "", False),
        ("GatherScatterIndicesBitpacked", "", False),
        ("GatherScatterIndicesBitpackedAndSent", "", True),
        ("lapack_sgesdd_ffi", "", False),
        ("__onednn$matmul", "", False),
        ("xla_ffi_python_cpu_callback", "", False),
        ("tpu_custom_call", '{"custom_call_config": {"body": "TUz"}}', False),
        ("tpu_custom_call", '{"custom_call_config": {"has_communication": true}}', True),
        ("tpu_custom_call", '{"custom_call_config": {"collective_id": 3}}', True),
        ("mosaic_gpu_v2", "", True),
        ("my_nccl_send", "", True),
    ],
)
def test_a_custom_call_that_can_communicate_is_listed(target, config, is_opaque):
    line = f'  %r = f32[8,4] custom-call(%x), custom_call_target="{target}"'
    ops = find_collectives(module(line + (f", backend_config={config}" if config else "")))
    assert [op.target for op in ops] == ([target] if is_opaque else [])


@pytest.mark.parametrize(
    "attributes, groups",
    [
        ("replica_groups={{0,1}}", ((0, 2), (1, 3))),
        ("channel_id=1, replica_groups={{0},{1}}", ((0, 1), (2, 3))),
        ("channel_id=1, replica_groups={{0,1},{2,3}}, use_global_device_ids=true", ROWS),
    ],
)
def test_groups_of_replicas_become_groups_of_devices(attributes, groups):
    text = module(f"  %r = f32[8,4] all-reduce(%x), {attributes}", partitions=2)
    (op,) = find_collectives(text.replace("is_scheduled=true", "replica_count=2"))
    assert tuple(op.groups) == groups


def test_two_modules_after_one_another_do_not_mix():
    one = module(f"  %r = f32[8,4] all-reduce(%x), {REPLICAS}")
    two = module(f"  %r = f32[16,4] all-gather(%x), {REPLICAS}")
    assert [op.kind for op in find_collectives(one + two)] == ["all-reduce", "all-gather"]
    assert len(read_modules(one + two)) == 2


def test_100_000_lines_take_a_few_seconds():
    lines = []
    for i in range(100_000):
        if i % 50:
            lines.append(f"  %a.{i} = f32[8,4]{{1,0}} fusion(%x), kind=kLoop, calls=%fused.{i}, "
                         f'metadata={{op_name="jit(f)/mul" stack_frame_id=2}}')  # fmt: skip
        else:
            lines.append(f"  %r.{i} = (f32[8,4], bf16[6]) all-reduce(%x, %y), {REPLICAS}, "
                         'metadata={op_name="jit(f)/psum" stack_frame_id=2}')  # fmt: skip
    text = module("\n".join(lines), before=TABLES + "1 {file_location_id=2 parent_frame_id=1}\n")
    start = time.process_time()
    assert len(find_collectives(text)) == 2000
    assert time.process_time() - start < 60  # quadratic work takes longer


def test_damaged_text_neither_crashes_nor_hides_the_collective():
    line = f"  %r = f32[8,4]{{1,0}} all-reduce(%x), {REPLICAS}, to_apply=%add"
    name_ends = line.index("=")
    for cut in range(name_ends + 1, len(line)):
        assert len(find_collectives(module(line[:cut]))) == 1
    for place in range(name_ends + 1, len(line)):
        for character in '(){}[]"=,%~':
            find_collectives(module(line[:place] + character + line[place + 1 :]))


def test_the_counts_that_xla_prints_in_long_lists_are_no_names():
    names = [f"%x{i}" for i in range(7)]
    body = "\n".join(f"  {n} = f32[{i + 1}]{{0}} parameter({i + 2})" for i, n in enumerate(names))
    operands = ", ".join(names[:5] + [f"/*index=5*/{names[5]}", names[6]])
    types = ", ".join(f"{'/*index=5*/' * (i == 5)}f32[{i + 1}]{{0}}" for i in range(7))
    line = f"  %r = ({types}) all-reduce({operands}), replica_groups={{}}, to_apply=%add"
    (op,) = find_collectives(module(f"{body}\n{line}"))
    assert (op.kind, op.elements) == ("all-reduce", 28)


@pytest.mark.parametrize(
    "made, wanted_by",
    [
        ("dot(%all-gather, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}", "dot_general"),
        ('custom-call(%all-gather, %q), custom_call_target="__cublas$gemm"', "dot_general"),
        ('custom-call(%all-gather, %q), custom_call_target="tpu_custom_call"', "dot_general"),
        ('custom-call(%all-gather), custom_call_target="LayoutConstraint"', "reshard"),
        ("copy(%all-gather)", "reshard"),
    ],
)
def test_what_computes_with_an_inserted_gather_wanted_it(made, wanted_by):
    own = 'metadata={op_name="jit(f)/dot_general"}'
    text = f"""HloModule m, num_partitions=2

ENTRY %main (p: f32[4,8], q: f32[8,8]) -> f32[4,8] {{
  %p = f32[4,8] parameter(0)
  %q = f32[8,8] parameter(1)
  %all-gather = f32[8,8] all-gather(%p), replica_groups={{{{0,1}}}}, dimensions={{0}}, \
frontend_attributes={{is_spmd_generated="true"}}, {own}
  %made = f32[8,8] {made}, {own}
  ROOT %slice = f32[4,8] slice(%made), slice={{[0:4], [0:8]}}, metadata={{op_name="jit(f)/reshard"}}
}}
"""
    gather = next(op for op in find_collectives(text) if op.kind == "all-gather")
    assert gather.marked
    assert gather.wanted_by == f"jit(f)/{wanted_by}"
