"""Which devices a collective means, and how many bytes: the cases of others, and XLA's own rules.

The expected groups are formed here from a grid of device numbers, replica by partition, as XLA's
`GetParticipatingDevicesGroups` says, and not by the reader.
"""

import itertools
import json
import random

import numpy as np
import pytest

from txcore.profiling import audit_text
from txcore.profiling.hlo import HloError, find_collectives, groups_of_block, sort_groups
from txcore.profiling.hlo.read_groups import parse_groups

ADD = """
add {
  a = f32[] parameter(0)
  b = f32[] parameter(1)
  ROOT c = f32[] add(a, b)
}
"""


def entry(body, header="HloModule jit_f"):
    head = f"{header}\n{ADD}\nENTRY main_spmd {{\n  p = f32[1000]{{0}} parameter(0)\n"
    return f"{head}  ROOT {body}\n}}\n"


def reduce(said):
    return f"r = f32[1000]{{0}} all-reduce(p), {said}, to_apply=add"


def row(text):
    (found,) = audit_text(text).collectives
    return found


def test_a_channel_alone_means_replicas_with_all_their_partitions():
    text = entry(reduce("channel_id=1, replica_groups={{0}}"), "HloModule jit_f, num_partitions=8")
    assert (row(text).group_size, row(text).wire_bytes) == (8, 7000)


def test_no_groups_without_a_channel_mean_all_replicas_each_partition_by_itself():
    text = entry(reduce("replica_groups={}"), "HloModule f, replica_count=4, num_partitions=2")
    (op,) = find_collectives(text)
    assert tuple(op.groups) == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert (row(text).group_size, row(text).wire_bytes) == (4, 6000)


UNKNOWN = entry(reduce("replica_groups={}"))


def test_without_counts_the_devices_are_unknown_and_that_is_said(tmp_path):
    report = audit_text(UNKNOWN)
    (found,) = report.collectives
    assert (found.group_size, found.payload_known, found.wire_known) == (0, True, False)
    line = str(report).splitlines()[3].split()
    assert line[:6] == ["all-reduce", "-", "?", "f32", "4", "kB"]
    assert line[6] == "?"
    assert "how many devices talk is not known: its module's header has no counts" in str(report)
    data = json.loads(report.to_json())
    assert data["at_least"] is True
    (shown,) = data["collectives"]
    assert (shown["group_size"], shown["payload_bytes"], shown["wire_bytes"]) == (None, 4000, None)
    assert "how many devices talk is not known" in shown["note"]
    report.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<td>?</td>" in page
    assert "how many devices talk is not known" in page
    assert "≥ 0 B" in page


def test_the_mesh_says_it_where_the_header_does_not():
    import jax

    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "model"))
    (found,) = audit_text(UNKNOWN, mesh=mesh).collectives
    assert (found.group_size, found.axes, found.wire_bytes) == (8, ("data", "model"), 7000)


@pytest.mark.parametrize(
    "line, size",
    [
        ("r = f32[4000]{0} all-gather(p), replica_groups={}, dimensions={0}", 4),
        ("r = (f32[1000], f32[8000]) all-gather-start(p), replica_groups={}, dimensions={0}", 8),
        ("r = f32[250]{0} reduce-scatter(p), replica_groups={}, dimensions={0}, to_apply=add", 4),
        ("r = (f32[1000], f32[1000]) all-to-all(p, p), replica_groups={}", 2),
        ("r = f32[1000] all-to-all(p), replica_groups={}, dimensions={0}", 0),
        ("r = f32[4000]{0} all-gather(p), channel_id=1, replica_groups={{0}}, dimensions={0}", 4),
        (reduce("replica_groups={{0,1},{2,3}}"), 2),
        (reduce("channel_id=1, replica_groups={{0,1}}, use_global_device_ids=true"), 2),
        (reduce("channel_id=1, replica_groups={{0,1}}"), 0),
        (reduce("channel_id=1, replica_groups=[2,4]<=[8], use_global_device_ids=true"), 4),
    ],
)
def test_without_counts_shapes_and_listed_groups_say_what_they_can(line, size):
    (op,) = find_collectives(entry(line))
    assert (op.kind == "unknown", op.group_size) == (False, size)
    assert bool(op.problem) == (size == 0)


COUNTS = "HloModule m, replica_count=4, num_partitions=2"
WHOLE = reduce("replica_groups={{0,1,2,3}}")


@pytest.mark.parametrize(
    "before",
    [
        "", "\ufeff", "  ", "\t", "\n\n  \ufeff", "some text before\n",
        "I1127 12:34:56.789012   12345 cpu_compiler.cc:123] ",
        "2026-11-27 12:34:56.789: I external/xla/xla/service/hlo_module.cc:45] ",
        "[rank0]: ", "[1,0]<stdout>:", "0: ",
        "[rank1]: I0000 00:00:1764214000.000000    1234 dump.cc:9] ",
    ],
)  # fmt: skip
def test_the_header_is_read_wherever_it_stands(before):
    prefix = before if before.strip("\ufeff \t\n") and "\n" not in before else ""
    lines = entry(WHOLE, COUNTS).splitlines()
    text = before + ("\n" + prefix).join(lines)
    (op,) = find_collectives(text)
    assert (op.kind, tuple(op.groups)) == ("all-reduce", ((0, 2, 4, 6), (1, 3, 5, 7)))


@pytest.mark.parametrize("indent", ["  ", "\t", "        "])
def test_an_indented_module_reads_as_one_that_is_not(indent):
    text = entry(WHOLE, COUNTS).replace("\n}", f'\n{indent}}}, execution_thread="main"')
    text = "\n".join(indent + line for line in text.splitlines())
    assert find_collectives(text) == find_collectives(entry(WHOLE, COUNTS))


def test_the_rows_of_a_constant_do_not_end_its_computation():
    constant = "k = s32[1,2,2] constant({\n  {\n    { 1, 2 },\n    { 3, 4 }\n  }\n  })\n  "
    text = entry(constant + WHOLE, COUNTS)
    (op,) = find_collectives(text)
    assert (op.kind, op.computation) == ("all-reduce", "main_spmd")


SLICES = """HloModule m, num_partitions=2
ENTRY e {
  in = f32[4,4,128]{2,1,0} parameter(0)
  out = f32[4,4,128]{2,1,0} parameter(1)
  other = bf16[2,8]{1,0} parameter(2)
  both = (f32[4,4,128], bf16[2,8]) tuple(in, other)
  z = s32[] constant(0)
  a = (s32[], s32[], s32[]) tuple(z, z, z)
  ROOT r = RESULT OP, channel_id=1, source_target_pairs={{0,1},{1,0}}, slice_sizes=SIZES
}
"""
ONE, START = "f32[4,4,128]{2,1,0}", "(f32[4,4,128], f32[4,4,128], u32[], u32[])"


@pytest.mark.parametrize(
    "result, op, sizes, sent",
    [
        (ONE, "collective-permute(in, out, a, a)", "{{2,4,128}}", 4096),
        (ONE, "collective-permute(in, out, a, a)", "{{1,4,128},{2,4,128}}", 2048 + 4096),
        (START, "collective-permute-start(in, out, a, a)", "{{2,4,128}}", 4096),
        ("(f32[4,4,128], bf16[2,8])", "collective-permute(both, both, a, a)",
         "{{1,4,128},{1,8}}", 2048 + 16),
        ("(f32[4,4,128], bf16[2,8])", "collective-permute(both, both, a, a)",
         "{{1,4,128},{1,4,128},{1,8},{2,8}}", 2 * 2048 + 16 + 32),
    ],
)  # fmt: skip
def test_a_permute_in_place_sends_its_slices(result, op, sizes, sent):
    (found,) = find_collectives(
        SLICES.replace("RESULT", result).replace("OP", op).replace("SIZES", sizes)
    )
    assert (found.kind, found.bytes, found.pairs) == ("collective-permute", sent, ((0, 1), (1, 0)))


def test_slices_that_fit_no_array_are_not_counted():
    text = SLICES.replace("RESULT", ONE).replace("OP", "collective-permute(both, both, a, a)")
    (found,) = find_collectives(text.replace("SIZES", "{{1,4,128},{1,8},{1,8}}"))
    assert (found.kind, "of 2 arrays" in found.problem) == ("unknown", True)


R, P = 6, 4  # replicas and partitions of the modules below
GRID = np.arange(R * P).reshape(R, P)
FLAGS = {
    "cross_replica": "",
    "cross_partition": "channel_id=1, ",
    "cross_replica_and_partition": "channel_id=1, ",
    "flattened_id": "channel_id=1, use_global_device_ids=true, ",
}
BY_MODE = {
    "cross_replica": "all-reduce",
    "cross_partition": "all-to-all",
    "cross_replica_and_partition": "all-gather",
    "flattened_id": "reduce-scatter",
}


def formed(groups, mode):
    """Return the groups of devices by XLA's definition, on a grid of device numbers."""
    if mode == "cross_replica":
        found = [GRID[group, p] for group in groups for p in range(P)]
    elif mode == "cross_partition":
        found = [GRID[r, group] for group in groups for r in range(R)]
    elif mode == "cross_replica_and_partition":
        found = [GRID[group].reshape(-1) for group in groups]
    else:
        found = [GRID.reshape(-1)[group] for group in groups]
    return tuple(sorted(tuple(sorted(map(int, group))) for group in found))


def listed(groups):
    return "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in groups) + "}"


@pytest.mark.parametrize("kind_of", ["implied", "said"])
@pytest.mark.parametrize("mode", FLAGS)
def test_group_modes(mode, kind_of):
    rng = random.Random(mode)
    count = {"cross_partition": P, "flattened_id": R * P}.get(mode, R)
    kind = BY_MODE[mode]
    flags = FLAGS[mode] if kind_of == "implied" else f"channel_id=1, mode={mode}, "
    for _ in range(40):
        ids = list(range(count))
        rng.shuffle(ids)
        size = rng.choice([n for n in range(1, count + 1) if count % n == 0])
        groups = [ids[i : i + size] for i in range(0, count, size)]
        line = f"r = f32[1000] {kind}(p), {flags}replica_groups={listed(groups)}, to_apply=add"
        (op,) = find_collectives(entry(line, f"HloModule m, replica_count={R}, num_partitions={P}"))
        assert tuple(op.groups) == formed(groups, mode), (groups, op.problem)
    line = f"r = f32[1000] {kind}(p), {flags}replica_groups={{}}, to_apply=add"
    (op,) = find_collectives(entry(line, f"HloModule m, replica_count={R}, num_partitions={P}"))
    assert tuple(op.groups) == formed([list(range(count))], mode)


@pytest.mark.parametrize(
    "said, mode", [("", "cross_replica"), (", channel_id=1", "cross_partition")]
)
def test_pairs_are_of_replicas_or_of_partitions(said, mode):
    line = f"r = f32[1000] collective-permute(p){said}, source_target_pairs={{{{0,1}},{{1,3}}}}"
    (op,) = find_collectives(entry(line, f"HloModule m, replica_count={R}, num_partitions={P}"))
    others = range(P) if mode == "cross_replica" else range(R)
    at = GRID if mode == "cross_replica" else GRID.T
    wanted = [(int(at[a, o]), int(at[b, o])) for a, b in ((0, 1), (1, 3)) for o in others]
    assert op.pairs == tuple(sorted(wanted))


@pytest.mark.parametrize(
    "said, problem",
    [
        ("replica_groups={{0,7}}", "replica 7 is in a group, but the header counts 6 of them"),
        ("channel_id=1, replica_groups={{0,24}}, use_global_device_ids=true",
         "device 24 is in a group, but the header counts 24 of them"),
        ("channel_id=1, mode=cross_partition, replica_groups={{4}}",
         "partition 4 is in a group, but the header counts 4 of them"),
    ],
)  # fmt: skip
def test_groups_of_what_is_not_there_are_not_counted(said, problem):
    (op,) = find_collectives(
        entry(reduce(said), f"HloModule m, replica_count={R}, num_partitions={P}")
    )
    assert (op.kind, problem in op.problem) == ("unknown", True)


def test_a_group_of_one_device_says_so():
    found = row(entry(reduce("replica_groups={}"), "HloModule m, num_partitions=4"))
    assert (found.group_size, found.wire_bytes) == (1, 0)
    assert found.note == "each device is alone in its group"


def test_groups_of_any_dims_are_those_of_their_list():
    rng = random.Random(7)
    for _ in range(300):
        sizes = [rng.choice([1, 2, 2, 3, 4, 6]) for _ in range(rng.randint(1, 4))]
        order = rng.sample(range(len(sizes)), len(sizes))
        count = int(np.prod(sizes))
        size = rng.choice([n for n in range(1, count + 1) if count % n == 0])
        ids = np.arange(count).reshape(sizes).transpose(order).reshape(-1, size)
        dims = ",".join(map(str, sizes))
        text = f"[{count // size},{size}]<=[{dims}]T({','.join(map(str, order))})"
        found, plain = parse_groups(text), parse_groups(listed(ids.tolist()))
        assert tuple(found) == tuple(sorted(tuple(sorted(g)) for g in ids.tolist())), text
        assert found == plain == sort_groups(ids.tolist())
        assert hash(found) == hash(plain)
        assert (found.size, found.devices, found.last, len(found)) == (
            *(size, count, count - 1), count // size,
        )  # fmt: skip
        assert found[-1] == tuple(found)[-1]


def test_a_mesh_of_two_dims_has_the_groups_of_its_axes():
    for sizes in itertools.product([1, 2, 3, 8], repeat=3):
        ids = np.arange(int(np.prod(sizes))).reshape(sizes)
        for chosen in itertools.product([False, True], repeat=3):
            kept = [i for i in range(3) if not chosen[i]]
            along = [i for i in range(3) if chosen[i]]
            size = int(np.prod([sizes[i] for i in along]))
            rows = ids.transpose(kept + along).reshape(-1, size).tolist()
            assert tuple(groups_of_block(zip(sizes, chosen, strict=True))) == tuple(
                map(tuple, rows)
            )


def test_groups_of_a_billion_devices_are_never_listed():
    line = reduce("channel_id=1, replica_groups=[2,1000000000]<=[2,2,500000000]T(1,0,2), "
                  "use_global_device_ids=true")  # fmt: skip
    (op,) = find_collectives(entry(line, "HloModule m, num_partitions=2000000000"))
    assert (op.group_size, len(op.groups)) == (10**9, 2)
    line = reduce("replica_groups={}")
    (op,) = find_collectives(
        entry(line, "HloModule m, replica_count=1000000000, num_partitions=1000000000")
    )
    assert (op.group_size, len(op.groups)) == (10**9, 10**9)


@pytest.mark.parametrize("text", ["[3,2]<=[3]", "[4,0]<=[0]", "[2,2]<=[4", "{{0,12345678901}}"])
def test_groups_that_are_none(text):
    with pytest.raises(HloError):
        parse_groups(text)


def loops(*trips):
    body = "%body (x: f32[8]) -> f32[8] {\n  %x = f32[8] parameter(0)\n  ROOT %r = f32[8] "
    body += "all-reduce(%x), replica_groups={}\n}\n"
    for i, count in enumerate(trips):
        callee = f"l{i - 1}" if i else "body"
        body += (
            f"%l{i} (x: f32[8]) -> f32[8] {{\n  %x = f32[8] parameter(0)\n  ROOT %w = f32[8] "
            f'while(%x), condition=%c, body=%{callee}, backend_config={{"known_trip_count":'
            f'{{"n":"{count}"}}}}\n}}\n'
        )
    call = f"  ROOT %y = f32[8] call(%x), to_apply=%l{len(trips) - 1}\n"
    return (
        f"HloModule m, replica_count=8\n{body}ENTRY %e (x: f32[8]) -> f32[8] {{\n"
        f"  %x = f32[8] parameter(0)\n{call}}}\n"
    )


@pytest.mark.parametrize("trips", [["9" * 5000], [10**9] * 3, ["9" * 18] * 400, [1 << 62]])
def test_trips_beyond_all_figures_are_said(trips, tmp_path):
    report = audit_text(loops(*trips))
    (found,) = report.collectives
    assert found.trips == 10**18 + 1
    assert "many" in str(report)
    data = json.loads(report.to_json())
    assert (data["payload_bytes"], data["wire_bytes"]) == ("over 10^18", "over 10^18")
    assert data["collectives"][0]["trips"] == "over 10^18"
    report.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "over 10^18 B" in page
    assert "0" * 18 not in page.replace("1000000000000000001", "")


def test_trips_that_can_be_counted_are():
    assert row(loops(10**9, 10**9)).trips == 10**18


def test_bytes_that_no_machine_holds_are_no_shape():
    text = entry("r = f32[8] all-reduce(f32[999999999999,999999999999] p), replica_groups={}")
    (op,) = find_collectives(text)
    assert (op.kind, "more than 10^18 bytes" in op.problem) == ("unknown", True)


def test_the_longest_text_is_an_option():
    with pytest.raises(ValueError, match="at most 100 bytes of HLO, but got"):
        audit_text(UNKNOWN, max_bytes=100)
    assert audit_text(UNKNOWN, max_bytes=len(UNKNOWN)).collectives


def test_an_attribute_is_one_only_outside_of_strings():
    said = 'replica_groups={}, metadata={op_name="replica_groups={{0,1}}, channel_id=1"}'
    (op,) = find_collectives(entry(reduce(said), COUNTS))
    assert tuple(op.groups) == ((0, 2, 4, 6), (1, 3, 5, 7))
    spoof = 'r = f32[8] fusion(p), metadata={op_name="f[replica_groups={{0,1}}]"}'
    assert not find_collectives(entry(spoof, COUNTS))
