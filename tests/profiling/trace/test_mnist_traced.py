"""MNIST under a profile, on two devices and on two processes, held to the raw events."""

import json
import pathlib
import subprocess
import sys

import processes
import pytest
from raw_times import time_collectives

from txcore.profiling.trace.show.page import to_page
from txcore.profiling.trace.trace import read_trace

HERE = pathlib.Path(__file__).parent
FLAGS = [
    "--model",
    "mlp",
    "--dataset",
    "digits",
    "--steps",
    "12",
    "--batch-size",
    "64",
    "--warmup",
    "1",
]
DELAY_S = 0.5
STEPS = (4, 10)


def run(command, folder, late_rank, flags):
    script = [HERE / "profiled_mnist.py", folder, late_rank, DELAY_S, *STEPS]
    done = subprocess.run(
        [sys.executable, *command, *map(str, script), *FLAGS, *flags],
        capture_output=True,
        text=True,
        env=processes.rank_environment(),
        timeout=processes.DEADLINE_S * 3,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if "AUDIT " in line)
    return dict(json.loads(line.partition("AUDIT ")[2]))


@pytest.fixture(scope="module")
def on_two_devices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices") / "trace"
    return folder, run([], folder, -1, ["--devices", "2"])


@pytest.fixture(scope="module")
def on_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes") / "trace"
    return folder, run(["-m", "txcore", "launch", "-n", "2", "--"], folder, 1, [])


@pytest.fixture(params=["on_two_devices", "on_two_processes"])
def traced(request):
    return request.getfixturevalue(request.param)


def find_step_hlo(folder, rank):
    texts = [path.read_text() for path in folder.glob(f"rank{rank}.*.hlo")]
    return "\n".join(text for text in texts if text.startswith("HloModule jit_train_step"))


def test_collectives_take_what_the_raw_events_say(traced):
    folder, _ = traced
    calls = nanoseconds = 0
    for file in folder.glob("*.xplane.pb"):
        rank = file.name[4:].partition(".")[0]
        for number, total in time_collectives(
            file.read_bytes(), find_step_hlo(folder, rank)
        ).values():
            calls, nanoseconds = calls + number, nanoseconds + total
    trace = read_trace(folder)
    mine = [c for c in trace.collectives if c.module == "jit_train_step"]
    assert sum(c.calls for c in mine) == calls == 2 * 6 * len(mine)
    assert sum(c.total for c in mine) == pytest.approx(nanoseconds, rel=0.001)


def test_hidden_and_exposed_are_all_of_it(traced):
    trace = read_trace(traced[0])
    for c in trace.collectives:
        assert c.hidden + c.exposed == c.total  # one at a time on each device, so the union is all
        assert 0 <= c.waiting <= c.total
    for step in trace.steps:
        parts = step.compute + step.exposed + step.input + step.host + step.idle
        assert parts == step.end - step.start
        assert step.own + step.waiting == step.end - step.start


def test_bytes_are_the_audits(traced):
    folder, audited = traced
    trace = read_trace(folder)
    mine = [c for c in trace.collectives if c.module == "jit_train_step"]
    assert {c.row.op: c.measured_bytes for c in mine} == audited
    assert {c.row.op: c.predicted_bytes for c in mine} == audited


def test_every_event_is_joined_to_its_line(traced):
    trace = read_trace(traced[0])
    assert trace.joined[0] == trace.joined[1] > 100
    assert trace.ok
    assert trace.checked
    (row,) = {c.row.source for c in trace.collectives}
    assert row.startswith("train.py:")
    tags = {tag for c in trace.collectives for tag in c.row.tags}
    assert {"pmean/loss", "pmean/grads.dense0.w"} <= tags
    assert len({step.number for step in trace.steps}) == 6
    assert trace.notes == ()


def test_the_late_rank_is_named(on_two_processes):
    trace = read_trace(on_two_processes[0])
    late = trace.stragglers[0]
    assert (late.rank, late.device, late.against, late.cause) == (1, -1, "others", "input")
    assert late.own > 0.9e9 * DELAY_S
    assert late.own > 1.5 * late.usual
    # Meanwhile the first rank waits, but for the end of the step before, which overlaps.
    others = [step for step in trace.steps if step.rank == 0]
    assert sum(step.waiting for step in others) > 0.4e9 * DELAY_S * len(others)
    mine = [step for step in trace.steps if step.rank == 1]
    assert sum(step.input for step in mine) > 0.4e9 * DELAY_S * len(mine)
    assert sum(step.waiting for step in mine) < sum(step.waiting for step in others) / 4


def test_the_page_shows_it(traced):
    page = to_page(read_trace(traced[0]))
    assert "pmean/loss" in page
    assert page.count("<svg") > 6
