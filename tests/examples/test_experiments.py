"""The scaling experiment: what it runs, compares, expects and draws."""

import json
import os
import pathlib
import re
import shlex

import experiments
import pytest
from docs_cases import commands
from scaling import advice, metrics, model
from scaling.cases import list_cases
from scaling.run import can_pin, environment, run_case, usable_cores

PAGE = "docs/experiments.md"
COMMANDS = [line for page, line, _ in commands("bash") if "experiments.py" in line]
FILES = ["efficiency.png", "loss_curves.png", "performance_metrics.json", "speedup.png"]
FILES += ["serial_results.json", "training_comparison.png"]
BARE = {"128": 0.1, "64": 0.06, "32": 0.04, "16": 0.03, "2": 0.02}


def make_runs(counts=(1, 2, 4), cores=2):
    """Return results of all cases: 0.1 s a step, less where a batch is shared."""
    runs = []
    for case in list_cases(counts, 128, cores, [8, 64, 512]):
        n = case.workers
        steps = 100 * 128 // case.batch_size if case.trains else 0
        seconds = BARE[str(case.batch_size // n)] + 0.02 * (n > 1)
        linear = case.rate_scaling == "linear"
        runs.append(
            {
                **case.to_dict(),
                "cores": list(range(cores))[:n],
                "oversubscribed": n * case.cores_per_worker > cores,
                "steps": steps,
                "examples": steps * case.batch_size,
                "set_on_devices": True,
                "train_seconds": steps * seconds,
                "images_per_second": case.batch_size / seconds,
                "step_seconds": BARE[str(case.batch_size // n)],
                "input_seconds": 0.004,
                "test_accuracy": 0.98 if linear else 0.97,
                "test_examples": 10_000,
                "loss_curve": [2.3 / (1 + i) for i in range(steps)],
                "compile_seconds": 1.5,
                "bare_step_seconds": BARE,
                "all_reduce": [
                    {"bytes": 4096, "seconds": 0.001},
                    {"bytes": 1 << 20, "seconds": 0.02},
                ]
                if n > 1
                else [],
                "jax": "0.12.0",
            }
        )
    return runs


CARRIED = {
    "programs": {str(n): {"payload_bytes": 1 << 20, "calls": 1} for n in (8, 64, 512)},
    "predicted": [
        {"target": "cuda:h100:1", "ranks": 1, "weak_step_seconds": 4e-5},
        {
            "target": "cuda:h100:8",
            "ranks": 8,
            "weak_step_seconds": 5e-5,
            "strong_step_seconds": 2e-5,
        },
        {"target": "tpu:v5p:1x1x1", "ranks": 1, "left_out": "its compiler is not here"},
        {"target": "tpu:v5p:2x2x2", "ranks": 8, "left_out": "its compiler is not here"},
    ],
}


def rows_of(found):
    return {row["name"]: row for row in found["runs"]}


def test_every_worker_gets_as_many_cores_in_all_runs():
    cases = list_cases([4, 1, 2], 128, 8, [])
    assert {case.cores_per_worker for case in cases if "all cores" not in case.name} == {2}
    names = [case.name for case in cases]
    assert names[0] == "serial"
    assert names[-1] == "serial, again"
    assert [name for name in names if name.startswith("4 ")] == [
        "4 processes",
        "4 processes, batch x 4",
        "4 processes, batch and rate x 4",
        "4 devices",
        "4 devices, batch x 4",
    ]
    assert [case.batch_size for case in cases if case.name.startswith("4 p")] == [128, 512, 512]


def test_the_metrics_are_those_counted_by_hand():
    found = metrics.compare_runs(make_runs(), CARRIED, cores=2)
    rows = rows_of(found)
    assert found["drift"] == 0
    two, four = rows["2 processes"], rows["4 processes"]
    assert two["speedup"] == pytest.approx(0.1 / 0.08)
    assert two["efficiency"] == pytest.approx(0.1 / 0.08 / 2)
    assert two["expected_speedup"] == pytest.approx(0.1 / (0.06 + 0.02))
    assert not two["oversubscribed"]
    assert four["oversubscribed"]
    assert four["expected_speedup"] == pytest.approx(0.1 / (2 * 0.04 + 0.02))
    weak = rows["2 processes, batch x 2"]
    assert weak["scaled_speedup"] == pytest.approx((256 / 0.12) / (128 / 0.1))
    assert weak["expected_efficiency"] == pytest.approx(0.1 / 0.12)
    assert "speedup" not in weak, "it is other work"


def test_the_model_is_carried_on_by_what_was_measured():
    found = metrics.compare_runs(make_runs(), CARRIED, cores=2)["model"]
    assert found["link"]["measured_in"] == "2 processes"
    eight, many, most = found["carried"]
    # A ring of 2 sends each byte once in 2 messages; a ring of 8 each 1.75 times in 14.
    bandwidth = ((1 << 20) - 4096) / 0.019
    latency = (0.001 - 4096 / bandwidth) / 2
    together = 14 * latency + 1.75 * (1 << 20) / bandwidth
    assert eight["all_reduce_seconds"] == pytest.approx(together)
    assert eight["strong_speedup"] == pytest.approx(0.1 / (0.03 + together))
    assert eight["weak_efficiency"] == pytest.approx(0.1 / (0.1 + together))
    assert many["strong_speedup"] is not None
    assert most["strong_speedup"] is None, "128 examples cannot be shared by 512"
    h100, left_out = found["predicted_on_targets"][1], found["predicted_on_targets"][3]
    assert h100["weak_efficiency"] == pytest.approx(0.8)
    assert h100["strong_speedup"] == pytest.approx(2)
    assert "weak_efficiency" not in left_out


def test_a_busy_moment_makes_no_endless_link():
    link = model.fit_link(2, {"bytes": 4096, "seconds": 0.5}, {"bytes": 1 << 20, "seconds": 0.4})
    assert link.seconds(2, 1 << 20) == pytest.approx(0.5)


@pytest.mark.parametrize("what", ["examples", "steps"])
def test_a_speedup_over_other_work_is_refused(what):
    runs = make_runs()
    two = next(run for run in runs if run["name"] == "2 devices")
    two[what] -= 1
    text = f"a speedup needs the same work, got {what} {two[what]} of 2 devices and {two[what] + 1}"
    with pytest.raises(RuntimeError, match=text):
        metrics.compare_runs(runs, CARRIED, cores=2)


def test_the_advice_says_its_figures():
    said = advice.give_advice(metrics.compare_runs(make_runs(), CARRIED, cores=2))
    assert said == [
        "threads: '2 processes' is the fastest on 2 cores, 1.25 times the serial run's images/s; "
        "one worker with all cores reaches 1.00",
        "oversubscribed: 4 processes on 2 cores run at 1.33 of '2 processes': it gains here",
        "oversubscribed: 4 devices on 2 cores run at 1.33 of '2 processes': it gains here",
        "input workers: reading ahead on a thread (prefetch 2) runs at 1.00 of reading when a step "
        "is due: no difference that can be told; input adds 4.0% to a step",
        "learning rate: batch 256 after as many examples: 97.00% at the same rate, 98.00% at 2 "
        "times it (noise 0.44 points): scale it",
        "learning rate: batch 512 after as many examples: 97.00% at the same rate, 98.00% at 4 "
        "times it (noise 0.44 points): scale it",
        "noise: the same step took 1.00 of its time at the end; differences below 2% are not told "
        "apart",
    ]


def test_accuracies_of_few_examples_decide_no_learning_rate():
    runs = [run | {"test_examples": 360} for run in make_runs()]  # about the digits'
    said = advice.give_advice(metrics.compare_runs(runs, CARRIED, cores=2))
    assert said[-2].endswith("(noise 2.33 points): either, they cannot be told apart")


def test_figures_of_a_busy_machine_are_doubtful():
    runs = make_runs()
    runs[0] |= {"train_seconds": 60.0, "images_per_second": 200.0}  # starved: 10 s alone
    said = advice.give_advice(metrics.compare_runs(runs, CARRIED, cores=2))
    assert said[0].startswith("DOUBTFUL: '2 processes' beats its ideal: something else ran")
    runs = make_runs()
    runs[-1]["step_seconds"] *= 1.5
    said = advice.give_advice(metrics.compare_runs(runs, CARRIED, cores=2))
    assert said[0].startswith("DOUBTFUL: a step's time has changed meanwhile")


@pytest.mark.parametrize("counts", [(1, 2, 4), (1, 2), (1,)])
def test_the_folder_has_every_file(counts, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(experiments, "run_all", lambda args, options: (make_runs(counts), CARRIED))
    monkeypatch.setattr(experiments, "usable_cores", lambda: [0, 1])
    flags = ["--process-counts", *map(str, counts), "--output-dir", str(tmp_path)]
    assert experiments.main(flags) == 0
    (folder,) = tmp_path.iterdir()
    assert re.fullmatch(r"experiment_\d{8}_\d{6}", folder.name)
    parallel = [f"parallel_{n}p_results.json" for n in counts if n > 1]
    assert sorted(os.listdir(folder)) == sorted([*FILES, *parallel])
    for path in folder.iterdir():
        if path.suffix == ".png":
            assert path.read_bytes()[:4] == b"\x89PNG"
            assert path.stat().st_size > 20_000
        else:
            json.loads(path.read_text())
    found = json.loads((folder / "performance_metrics.json").read_text())
    assert {row["name"] for row in found["runs"]} >= {
        "serial",
        *[f"{n} devices" for n in counts[1:]],
    }
    assert str(folder) in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, text",
    [
        (["--process-counts", "1", "0"], "--process-counts needs counts from 1 on, got 1 0"),
        (["--epochs", "0"], "--epochs needs counts from 1 on, got 0"),
        (["--carry-to", "-8"], "--carry-to needs counts from 1 on, got -8"),
        (
            ["--process-counts", "1", "3"],
            "--batch-size 128 cannot be shared equally by 3 workers: use a multiple of 3, or leave "
            "it out of --process-counts",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(flags, text, capsys):
    assert experiments.main(flags) == 2
    assert capsys.readouterr().err == f"experiments.py: {text}\n"


OPTIONS = {"model": "dense", "epochs": 1, "learning_rate": 0.02, "warmup": 1, "seed": 0}
OPTIONS |= {"dataset": "digits", "data_dir": None, "train_size": 96, "base_batch": 32}


@pytest.mark.slow
def test_ranks_train_on_their_cores_and_time_their_parts(tmp_path):
    cores = usable_cores()[:1]
    case = next(c for c in list_cases([1, 2], 32, 1, []) if c.name == "2 processes")
    run = run_case(case, OPTIONS, cores, tmp_path)
    assert (run["steps"], run["examples"], run["dataset"]) == (3, 96, "digits")
    assert len(run["loss_curve"]) == 3
    assert run["set_on_devices"], "as train.py holds it"
    assert run["oversubscribed"], "two workers on one core"
    assert run["cores"] == (cores if can_pin() else run["cores"])
    assert run["compile_seconds"] > 0 < run["step_seconds"]
    assert run["gradient_bytes"] == 4 * (784 * 128 + 128 + 128 * 10 + 10)
    assert [row["bytes"] for row in run["all_reduce"]] == [4096, run["gradient_bytes"]]
    assert set(run["bare_step_seconds"]) == {"32"}


def test_no_run_takes_what_it_compiles_from_a_folder(monkeypatch):
    monkeypatch.setenv("TXCORE_CACHE", "kept")
    assert "TXCORE_CACHE" not in environment()


def test_a_rank_that_fails_is_named_with_what_it_said(tmp_path):
    case = list_cases([1], 32, 1, [])[0]
    text = r"serial ended with exit code 1: (.|\n)*--model needs one of .*, got 'none'"
    with pytest.raises(RuntimeError, match=text):
        run_case(case, OPTIONS | {"model": "none"}, usable_cores(), tmp_path)


def test_the_command_of_the_page_is_one():
    assert COMMANDS
    for line in COMMANDS:
        experiments.check(experiments.parse(shlex.split(line)[2:]))


@pytest.mark.extra
@pytest.mark.slow
def test_the_whole_command(tmp_path):
    flags = ["--process-counts", "1", "2", "--model", "dense", "--dataset", "digits"]
    flags += ["--train-size", "96", "--batch-size", "32", "--carry-to", "8", "--warmup", "1"]
    assert experiments.main([*flags, "--output-dir", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {*FILES, "parallel_2p_results.json"}
    found = json.loads((pathlib.Path(folder) / "performance_metrics.json").read_text())
    accuracies = {row["accuracy"] for row in found["runs"] if row["group"] in ("serial", "strong")}
    assert max(accuracies) - min(accuracies) < 0.02, "one batch, however it is shared"
    assert found["model"]["carried"][0]["ranks"] == 8
