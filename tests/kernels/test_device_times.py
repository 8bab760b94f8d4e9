"""The time of calls from what the profiler records of a device."""

import json
import pathlib

import jax
import machine
import pytest

from txcore.kernels.tuning import timing

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
