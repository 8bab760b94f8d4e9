"""Files: what is read of them, and which are refused."""

import gzip
import json
import pathlib

import jax
import numpy as np
import pytest
from hand_made import HLO, make_event, make_rank, make_xspace

from txcore.profiling.trace.folder import read_folder, write_rank
from txcore.profiling.trace.model import Row, TraceError
from txcore.profiling.trace.read import read_events
from txcore.profiling.trace.show.table import format_trace
from txcore.profiling.trace.trace import measure_ranks, read_trace

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "trace"


def op(name, start, end, device=0, number=0, line="pool"):
    stats = {"hlo_op": name, "hlo_module": "jit_step", "run_id": 7, "device_ordinal": device}
    return (line, name, start, end - start, stats | ({"_p": number} if number else {}))


EVENTS = [
    op("dot.1", 0, 10, number=5),
    ("other", "end: dot.1", 14, 1, {"_c": 5}),
    op("all-reduce.1", 20, 50),
    op("dot.1", 3, 11, device=2048),
    op("all-reduce.1", 11, 50, device=2048),
    ("main", "txcore.step", 0, 9, {}),
    ("main", "txcore.input", 9, 4, {}),
    ("main", "Wait for usage holds", 9, 4, {}),
]


def write_folder(folder, ranks=1, processes=None, hlo=HLO, **about):
    folder.mkdir(exist_ok=True)
    for rank in range(ranks):
        (folder / f"rank{rank}.xplane.pb").write_bytes(make_xspace(EVENTS, clock=100))
        said = {"rank": rank, "processes": processes or ranks, "host": "a", "devices": [0, 2048]}
        said |= {"asked_steps": 1, "recorded_steps": 1} | about
        row = Row("all-reduce.1", "all-reduce", "txcore", ("pmean/grads",), ("data",), 2)
        write_rank(folder, said, [(hlo, [row], True, [0, 2048])])
    return folder


def test_events_of_devices_and_of_the_host(tmp_path):
    file = tmp_path / "x.xplane.pb"
    file.write_bytes(make_xspace(EVENTS, host="node7", clock=123456789))
    rank = read_events(file, 3)
    assert (rank.rank, rank.host, rank.clock, rank.platform) == (3, "node7", 123456789, "cpu")
    assert rank.devices == (0, 2048)
    assert [(e.device, e.op, e.run, e.start, e.end, e.latest) for e in rank.events] == [
        (0, "dot.1", 7, 0, 10, 14),
        (1, "dot.1", 7, 3, 11, 11),
        (1, "all-reduce.1", 7, 11, 50, 50),
        (0, "all-reduce.1", 7, 20, 50, 50),
    ]
    assert rank.work == (("host", 0, 9), ("input", 9, 13))


def test_what_the_profiler_reports_is_said(tmp_path):
    file = tmp_path / "x.xplane.pb"
    said = 'errors: "No slot" warnings: "1000 events were dropped"'
    file.write_bytes(make_xspace(EVENTS, extra=said))
    assert read_events(file).notes == (
        "the profiler reports an error: No slot",
        "the profiler reports a warning: 1000 events were dropped",
    )


@pytest.mark.parametrize("kept", [1, 40, 200, -1])
def test_a_file_that_was_cut_off_is_refused(tmp_path, kept):
    file = tmp_path / "x.xplane.pb"
    file.write_bytes(make_xspace(EVENTS)[:kept])
    with pytest.raises(
        TraceError, match=r"is cut off, or no trace: it needs to be an \.xplane\.pb"
    ):
        read_events(file)


@pytest.mark.parametrize("content", [b"", b"no trace at all", b"\x0a\x03abc", b"\x0a\x02\x1a\x05"])
def test_what_is_no_trace_is_refused(tmp_path, content):
    file = tmp_path / "x.xplane.pb"
    file.write_bytes(content)
    with pytest.raises(TraceError):
        read_events(file)


def test_a_folder_without_a_trace_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(TraceError, match=r"a trace needs an \.xplane\.pb, but .* holds none"):
            read_trace(folder)


def test_a_folder_of_a_profile(tmp_path):
    trace = read_trace(write_folder(tmp_path / "a"))
    (found,) = trace.collectives
    assert (found.row.tags, found.row.axes) == (("pmean/grads",), ("data",))
    assert found.waiting == 9
    assert trace.checked
    assert trace.notes == ()


def test_jax_profilers_own_folder_takes_hlo(tmp_path):
    folder = tmp_path / "plugins" / "profile" / "2026_11_27"
    folder.mkdir(parents=True)
    (folder / "vm.xplane.pb").write_bytes(make_xspace(EVENTS))
    (folder.parent / "2026_11_26").mkdir()
    trace = read_trace(tmp_path, hlo=[HLO])
    assert trace.joined == (4, 4)
    assert not trace.checked
    assert "by the words of the compiled program" in format_trace(trace)
    assert read_trace(tmp_path).joined == (0, 4)


def test_missing_ranks_and_steps_are_said(tmp_path):
    folder = write_folder(tmp_path / "a", ranks=1, processes=3, asked_steps=5, recorded_steps=2)
    ranks, missing = read_folder(folder)
    assert missing == (
        "the traces of rank 1, 2 of 3 are missing: their waiting and arrivals are not known; copy "
        "their files into the folder",
    )
    assert ranks[0].notes == (
        "rank 0: the trace is cut off after 2 of 5 steps: training ended first",
    )
    (folder / "rank0.json").unlink()
    (note,) = read_folder(folder)[0][0].notes
    assert note == "rank 0: rank0.json is missing: its profile was cut off before it ended"


def test_a_damaged_record_is_refused(tmp_path):
    folder = write_folder(tmp_path / "a")
    file = folder / "rank0.json"
    good = json.loads(file.read_text())
    for change in ({"rank": -1}, {"version": 2}, {"programs": 3}, {"devices": ["x"]}):
        file.write_text(json.dumps(good | change))
        with pytest.raises(TraceError, match=r"rank0.json needs .*: profile again"):
            read_folder(folder)
    good["programs"][0]["file"] = "../secret"
    file.write_text(json.dumps(good))
    with pytest.raises(TraceError, match="needs the name of an HLO file beside it"):
        read_folder(folder)


@pytest.fixture(scope="module")
def h100(tmp_path_factory):
    folder = tmp_path_factory.mktemp("h100")
    file = folder / "mnist.xplane.pb"
    file.write_bytes(gzip.decompress((FIXTURES / "mnist_h100.xplane.pb.gz").read_bytes()))
    hlo = gzip.decompress((FIXTURES / "mnist_h100.hlo.gz").read_bytes()).decode()
    return file, hlo


def test_an_h100s_trace_is_joined_to_its_hlo(h100):
    file, hlo = h100
    trace = read_trace(file, hlo=[hlo])
    assert (trace.platform, trace.devices) == ("gpu", ((0, 0),))
    # All but the copy in a command buffer whose kernel, memcpy32_post, names no instruction.
    assert trace.joined == (225, 230)
    unjoined = {event.op for event in trace.events if event.place is None}
    assert unjoined == {"command_buffer_32"}
    assert len(trace.steps) == 5
    assert trace.collectives == ()
    assert trace.ok
    by_op = {o.op: o for o in trace.operations}
    assert by_op["gemm_fusion_dot.4"].calls == 5  # in a command buffer, by its kernel's name
    assert by_op["gemm_fusion_dot.4"].op_name.endswith("dot_general")
    assert by_op["cudnn-conv.2"].opcode == "custom-call"
    assert by_op["cudnn-conv.2"].source
    (note,) = trace.notes
    assert note.startswith("rank 0: 140 of 230 events ran in command buffers (CUDA graphs), ")


def test_an_h100s_busy_time_is_that_of_its_stream(h100):
    file, hlo = h100
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    (stream,) = next(plane for plane in planes if plane.name == "/device:GPU:0").lines
    spans = [(round(e.start_ns), round(e.start_ns + e.duration_ns)) for e in stream.events]
    busy = np.zeros(
        max(end for _, end in spans), bool
    )  # a nanosecond each: graphs' kernels overlap
    for start, end in spans:
        busy[start:end] = True
    trace = read_trace(file, hlo=[hlo])
    assert sum(o.total for o in trace.operations) == sum(end - start for start, end in spans)
    assert sum(step.compute for step in trace.steps) == busy.sum()
    for step in trace.steps:
        assert 300_000 < step.compute < 320_000
        assert step.compute + step.host + step.idle + step.input == step.end - step.start


def test_a_profile_on_gpu_says_what_it_leaves_out(tmp_path):
    folder = write_folder(tmp_path / "a")
    on_gpu = make_xspace([op("dot.1", 0, 10), op("all-reduce.1", 10, 50)], plane="/device:GPU:1")
    (folder / "rank0.xplane.pb").write_bytes(on_gpu)
    ranks, _ = read_folder(folder)
    assert (ranks[0].platform, ranks[0].devices) == ("gpu", (2048,))  # the process's second device
    assert ranks[0].notes == (
        "rank 0: an engine's steps ran without command buffers (CUDA graphs), as tx.profile "
        "compiles them: outside of a profile a step may take less time",
    )
    assert read_trace(folder).collectives[0].waiting is None


def test_hand_made_events_of_nccl_are_collectives():
    kernel = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    rank = make_rank([make_event("x.1", 0, 5, kernel=kernel)], hlo="")
    (found,) = measure_ranks([rank]).undeclared
    assert found.row.kind == "all-reduce"
