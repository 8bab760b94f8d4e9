"""The time of calls from what the profiler records of a device."""

import json
import pathlib
import threading

import jax
import machine
import pytest

from txcore.kernels.dispatch import registry
from txcore.kernels.tuning import measure, timing
from txcore.kernels.tuning.shapes import SHAPES

ROOT = pathlib.Path(__file__).parents[2]


def test_a_devices_events_are_cut_at_each_run_of_the_marker():
    events = [
        ("jit_early", 0.0, 5.0),
        ("jit__marker", 10.0, 1.0),
        ("jit_f", 20.0, 4.0),
        ("jit_f", 22.0, 6.0),
        ("jit__marker", 40.0, 1.0),
        ("jit__marker", 50.0, 1.0),
        ("jit_g", 60.0, 3.0),
    ]
    runs = timing.runs_between(events, "_marker")
    assert [[name for name, *_ in run] for run in runs] == [["jit_f", "jit_f"], [], ["jit_g"]]


@pytest.mark.parametrize(
    "events, busy",
    [
        ([], 0),
        ([("f", 10, 5)], 5),
        ([("f", 10, 5), ("f", 20, 5)], 10),  # the gap is the host's
        ([("f", 10, 5), ("f", 12, 8)], 10),  # two at once count once
        ([("f", 10, 9), ("f", 12, 2), ("f", 15, 10)], 15),
    ],
)
def test_the_time_in_which_something_runs_is_counted_once(events, busy):
    assert timing._busy_nanoseconds(events) == busy


@machine.cpu_only("a CPU's trace has no device")
def test_a_device_that_the_profiler_does_not_record_is_an_error():
    with pytest.raises(RuntimeError, match=r"needs to record 2 calls, got 0: time fewer"):
        timing.device_times({"f": lambda: None}, rounds=2)


@machine.cpu_only("it asks for a device's clock")
def test_a_cpu_is_timed_by_the_hosts_clock(monkeypatch):
    monkeypatch.setattr(timing, "alternate_calls", lambda calls, rounds: {"f": 7.0})
    assert timing.time_calls({"f": lambda: None}, 3) == {"f": 7.0}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(timing, "device_times", lambda calls, rounds: {"f": (5.0, 2)})
    assert timing.time_calls({"f": lambda: None}, 3) == {"f": 5.0}


def test_what_a_benchmark_found_fastest_is_recorded(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    import gpu_results

    from txcore.kernels.dispatch import tuning_file

    def row(key, implementation, us):
        return {"key": key, "implementation": implementation, "config": {}, "us": us}

    rows = [
        *(row("a", "xla", 10.0), row("a", "triton_ir", 5.0)),
        *(row("b", "xla", 10.0), row("b", "pallas_triton", 9.8)),  # no more than noise
        {"case": "b", "name": "xla plain", "us": 1.0},  # no implementation
    ]
    result = {"machine": {"jax": "0.11.2", "card": "A card"}, "parts": {"x": rows}}
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(result))
    (tmp_path / "kernels" / "dispatch" / "recorded").mkdir(parents=True)
    monkeypatch.setattr(gpu_results, "ROOT", tmp_path)
    gpu_results.record_fastest(file)
    found = tuning_file.read_entries(tmp_path / "kernels" / "dispatch" / "recorded" / "gpu.json")
    assert (found["a"].implementation, found["b"].implementation) == ("triton_ir", "xla")
    assert found["a"].machine == "A card"
    assert found["b"].microseconds == {"xla": 10.0, "pallas_triton": 9.8}


@pytest.fixture
def gpu_plot(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    import gpu_plot

    return gpu_plot


def test_who_is_faster_is_said_of_each_problem(gpu_plot):
    def row(case, name, us, implementation=None, **more):
        found = {"case": case, "name": name, "us": us, **more}
        return found | ({} if implementation is None else {"implementation": implementation})

    moved = {"bytes": 4e12, "flops": 0}
    conv = [
        row("a float32", "xla(form=x)", 9e6, "xla", **moved),
        row("a float32", "pallas_triton(x=1)", 2e6, "pallas_triton", **moved),
        row("a float32", "pallas_triton(x=2)", 5e6, "pallas_triton", **moved),
        row("a float32", "xla plain", 8e6),
        {"case": "a float32", "name": "mosaic_gpu", "why": "it failed"},
        row("b bfloat16", "xla", 1e6, "xla", bytes=4, flops=1e12),
        row("b bfloat16", "triton_ir", 1.04e6, "triton_ir", bytes=4, flops=1e12),
    ]
    measured = [
        {"case": "ceiling", "name": "copy", "value": 4e12},
        {"case": "ceiling", "name": "matmul bf16", "value": 2e12},
        {"case": "ceiling", "name": "matmul f32 (TF32)", "value": 1e12},
    ]
    torch = [row("a float32", "torch eager", 7e6), row("a float32", "torch compiled", 6e6)]
    result = {"parts": {"ceilings": measured, "conv": conv, "torch": torch}}
    a, b = gpu_plot.list_problems(result)
    assert (a["us"], a["name"]) == ({"txcore": 2e6, "XLA": 8e6, "PyTorch": 6e6}, "pallas_triton")
    assert (a["ceiling"], b["ceiling"]) == (1e6, 0.5e6)  # a second of the copy; half of products
    lines = gpu_plot.format_summary(result).splitlines()[2:]
    assert [line.split(" | ")[-1] for line in lines] == ["**4.00** |", "0.96: matches |"]


def test_the_page_shows_what_was_measured(gpu_plot):
    result = json.loads((ROOT / "benchmarks/results/gpu_NVIDIA_H200.json").read_text())
    assert gpu_plot.format_summary(result) in (ROOT / "docs" / "kernels.md").read_text()


def test_a_page_is_drawn_of_it(gpu_plot, tmp_path):
    pytest.importorskip("matplotlib")
    result = json.loads((ROOT / "benchmarks/results/gpu_NVIDIA_H200.json").read_text())
    gpu_plot.draw_plot(result, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


def test_candidates_are_compiled_at_once_and_timed_one_after_the_other(monkeypatch):
    together, running = threading.Barrier(2, timeout=60), []

    def compile_call(shape, dtype, choice, **options):
        together.wait()  # a compiler that waits for the other one to start would time out

        def call():
            assert not running
            running.append(choice)
            running.clear()

        return call

    monkeypatch.setattr(measure, "compile_call", compile_call)
    monkeypatch.setattr(measure.os, "cpu_count", lambda: 2)
    choices = {name: registry.Choice(name, None, "given") for name in ("a", "b")}
    calls, failed = measure.compile_calls(
        SHAPES["norm-odd"], "float32", choices, backward=True, operands=()
    )
    assert (set(calls), failed) == ({"a", "b"}, {})
    assert set(timing.alternate_calls(calls, 2)) == {"a", "b"}


def test_a_run_without_a_gpu_traces_what_it_would_time(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    import gpu_cases

    with gpu_cases.tracing_only():
        rows = gpu_cases.time_cases(SHAPES["norm-odd"], "float32", (), others={"other": None})
    assert {row["case"] for row in rows} == {"norm-odd float32"}
    names = [row["name"].partition("(")[0] for row in rows]
    assert [names.count(name) for name in ("other", "xla", "pallas_triton")] == [1, 2, 3]
    assert not any("why" in row for row in rows)
