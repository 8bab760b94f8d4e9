"""The comparison with the peers: its harness, without PyTorch and TensorFlow."""

import argparse
import dataclasses
import json
import os
import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks" / "peers"))

import accuracy
import compare
import inputs
import pool
import report
import throughput
import worker

CORE = min(os.sched_getaffinity(0))

# A worker without a framework: it reports its core and the losses it is told to.
FAKE = """
import os, sys
sys.path.insert(0, {here!r})
import worker
args = worker.parse_arguments()
if args.form == "fails":
    sys.exit("no such framework")
if args.form == "hangs":
    import time
    time.sleep(60)
print("a library's banner")
cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
versions = {{"cores": cores, "threads": os.environ["OMP_NUM_THREADS"]}}
worker.serve_requests(args, lambda x: x, [loss + args.rank for loss in (1.0, 2.0, 3.0)], versions)
"""


@pytest.fixture
def fake(tmp_path):
    """Return a function that starts a contender of fake workers."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE.format(here=str(pool.HERE)))

    def start(processes=1, form="best"):
        contender = pool.Contender("fake", str(script), processes, 2 // processes, form=form)
        cores = [CORE] * processes
        return pool.launch_command(
            [contender], {False: sys.executable}, cores, ["--data=none", "--weights=none"]
        )

    return start


def test_a_worker_goes_through_its_batches_again_and_again(fake):
    with fake() as (running,):
        seconds, losses = running.run(2)
        assert losses == [1, 2]
        assert 0 <= seconds < 1
        assert running.run(3)[1] == [3, 1, 2]


@pytest.mark.parametrize(
    "ahead, order", [(None, "ABCabc"), (2, "ABCabc"), (1, "ABaCbc"), (0, "AaBbCc")]
)
def test_a_step_is_waited_for_once_so_many_more_have_been_started(ahead, order):
    seen = []

    def started(name):
        seen.append(name)
        return name.lower()

    def waited_for(name):
        seen.append(name)
        return name

    assert worker.read_losses(map(started, "ABC"), waited_for, ahead) == ["a", "b", "c"]
    assert "".join(seen) == order


def test_the_losses_are_the_mean_over_the_processes(fake):
    with fake(processes=2) as (running,):
        assert running.run(3)[1] == [1.5, 2.5, 3.5]


def test_a_worker_runs_on_its_core_with_a_thread_for_it(fake):
    with fake() as (running,):
        assert running.versions["cores"] == str(CORE)
        assert running.versions["threads"] == "1"
        assert running.versions["python"] == sys.version.split()[0]


def test_a_worker_finds_nothing_compiled_before(monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    assert pool.worker_environment(1)["JAX_ENABLE_COMPILATION_CACHE"] == "false"


def test_cores_are_shared_out_one_to_each_process():
    assert pool.divide_cores([4, 7], 1) == [[4, 7]]
    assert pool.divide_cores([4, 7], 2) == [[4], [7]]


def test_leaving_ends_the_processes(fake):
    with fake(processes=2) as (running,):
        workers = running._workers
        assert all(each.poll() is None for each in workers)
    assert all(each.poll() is not None for each in workers)


def test_a_failing_worker_is_named_with_what_it_said(fake):
    with (
        pytest.raises(pool.PeerError, match=r"fake: worker 0 ended.*\nno such framework"),
        fake(form="fails"),
    ):
        pass


def test_a_worker_that_hangs_is_ended(fake, monkeypatch):
    monkeypatch.setattr(pool, "SECONDS", 0.3)
    with (
        pytest.raises(pool.PeerError, match="worker 0 ended, or was ended after 0 s"),
        fake(form="hangs"),
    ):
        pass


def test_each_rank_takes_its_rows_of_every_batch(tmp_path):
    images = np.arange(3 * 4 * 2, dtype=np.float32).reshape(3, 4, 2)
    labels = np.arange(12).reshape(3, 4)
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    args = [argparse.Namespace(data=tmp_path / "data.npz", processes=2, rank=r) for r in (0, 1)]

    first, second = (worker.load_batches(each) for each in args)

    assert len(first) == len(second) == 3
    for i in range(3):
        np.testing.assert_array_equal(np.concatenate([first[i][0], second[i][0]]), images[i])
        np.testing.assert_array_equal(np.concatenate([first[i][1], second[i][1]]), labels[i])


def test_batches_are_cut_from_the_data_in_order():
    images, labels = np.arange(10.0)[:, None], np.arange(10)
    batches = inputs.global_batches(images, labels, batch=4, count=5)
    assert batches["images"].shape == (2, 4, 1)
    np.testing.assert_array_equal(batches["labels"], [[0, 1, 2, 3], [4, 5, 6, 7]])


def test_too_few_examples_are_refused():
    with pytest.raises(ValueError, match="3 examples, too few for a batch of 4"):
        inputs.global_batches(np.zeros((3, 1)), np.zeros(3), batch=4, count=1)


def test_synthetic_images_are_the_same_each_time():
    (images, labels), (again, _) = inputs.make_synthetic(50), inputs.make_synthetic(50)
    np.testing.assert_array_equal(images, again)
    assert images.shape == (50, 28, 28, 1)
    assert images.dtype == np.float32
    assert set(labels) <= set(range(10))


def test_equal_losses_agree():
    losses = {"a": [2.0, 1.0], "b": [2.0, 1.0005], "c": [2.01, 1.01]}
    precisions = {"a": "float32", "b": "float32", "c": "bfloat16"}
    deviations = throughput.check_agreement(losses, precisions)
    assert deviations["a"] == pytest.approx(0.00025, rel=0.01)  # the median is between a and b
    assert deviations["c"] == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("value", [1.01, float("nan"), float("inf")])
def test_the_contender_that_deviates_is_named(value):
    losses = {"a": [1.0], "b": [1.0], "c": [value]}
    with pytest.raises(pool.PeerError, match=r"from the median for c by \S+ \(allowed: 0.001\)$"):
        throughput.check_agreement(losses, dict.fromkeys(losses, "float32"))


def test_bfloat16_is_held_to_the_losses_of_float32():
    losses = {"a": [1.0], "b": [1.1], "c": [1.1]}
    precisions = {"a": "float32", "b": "bfloat16", "c": "bfloat16"}
    with pytest.raises(pool.PeerError, match=r"for b by 0.1 \(allowed: 0.02\); c by"):
        throughput.check_agreement(losses, precisions)


class Pretended:
    """Stands for a running contender whose steps take a known time."""

    def __init__(self, name, seconds_per_step, log):
        self.contender = pool.Contender(name, "", 1, 2)
        self.seconds, self.log = seconds_per_step, log

    def run(self, steps):
        self.log.append((self.contender.name, steps))
        return steps * self.seconds, [0.0] * steps


def test_every_contender_runs_once_a_round_in_changing_order():
    log = []
    running = [Pretended(name, 0.5, log) for name in "abcdef"]

    throughput.measure_throughput(
        running, rounds=4, steps=10, batch=8, seed=0, say=lambda text: None
    )

    timed = [name for name, steps in log if steps == 10]
    rounds = [timed[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(each) == list("abcdef") for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
    # Each is warmed up right before it is timed.
    assert all(log[i] == (log[i + 1][0], throughput.WARM_STEPS) for i in range(0, len(log), 2))


def test_the_rate_is_that_of_the_global_batch():
    rates = throughput.measure_throughput(
        [Pretended("a", 0.5, [])], rounds=2, steps=10, batch=8, seed=0, say=lambda text: None
    )
    assert rates == {"a": [16.0, 16.0]}


def test_ratios_are_taken_within_a_round():
    # The machine is half as fast in the second round: no ratio may see it.
    rates = {"ours": [200.0, 100.0, 150.0], "x": [100.0, 50.0, 50.0], "own too": [1.0, 1.0, 1.0]}
    ratios = throughput.list_ratios(rates, ["ours", "own too", "absent"])
    assert ratios["ours"] == {"x": throughput.Ratio(2.0, 2.0, 3.0)}
    assert list(ratios) == ["ours", "own too"]


def test_the_throughput_table():
    rates = {"ours": [2000.0, 3000.0, 4000.0], "x": [1000.0, 1500.0, 1000.0]}
    assert report.throughput_table(rates, throughput.list_ratios(rates, ["ours"])) == (
        "|  | images/s | ours / this |\n"
        "| --- | ---: | ---: |\n"
        "| ours | 3,000 (2,000 to 4,000) |  |\n"
        "| x | 1,000 (1,000 to 1,500) | 2.00 (2.00 to 4.00) |"
    )


def test_the_accuracy_table_counts_what_did_not_get_there():
    run = accuracy.Run
    runs = {
        "ours": [run(0, 10.0, [0.99]), run(1, 12.0, [0.98, 0.99]), run(2, None, [0.98] * 3)],
        "x": [run(0, None, [0.1] * 3), run(1, None, [0.1] * 3), run(2, 40.0, [0.1, 0.99])],
        "y": [run(0, 48.0, [0.99]), run(1, 48.0, [0.99]), run(2, 50.0, [0.99])],
    }
    assert report.accuracy_table(runs, ["ours", "absent"]) == (
        "|  | seconds | epochs | seeds there | ours / this |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| ours | 12.0 | 2 | 2 of 3 | 1.00 |\n"
        "| x | not reached | 3 | 1 of 3 |  |\n"
        "| y | 48.0 | 1 | 3 of 3 | 0.25 |"
    )


def test_the_machine_is_described():
    machine = report.describe_machine([0, 1])
    assert machine["cores_used"] == [0, 1]
    assert machine["cores_of_machine"] == os.cpu_count()
    assert machine["cpu"]
    assert machine["date"].startswith("20")


def test_results_and_plot_are_written(tmp_path):
    path = tmp_path / "new" / "results.json"
    report.write_json(path, {"a": [1, 2]})
    assert json.loads(path.read_text()) == {"a": [1, 2]}
    report.plot_results(
        tmp_path / "plot.png", {"txcore": [1.0, 2.0], "x": [1.0]}, "images/s", "a title"
    )
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def trainer(program, processes=1, epochs=2):
    return accuracy.Trainer(
        "one", True, processes, epochs, lambda rank, port, seed: ["-c", program, str(rank)]
    )


def run_one(program, processes=1, epochs=2):
    return accuracy.run_one(
        trainer(program, processes, epochs),
        goal=0.99,
        seed=3,
        cores=[CORE] * processes,
        pythons={True: sys.executable},
    )


def test_the_clock_stops_when_the_goal_is_reached():
    program = """
import time
print("eval 469/938  50.0%  test_accuracy 0.9825", flush=True)
time.sleep(0.2)
print('{"epoch": 2, "test_accuracy": 0.9900}', flush=True)
time.sleep(60)
"""
    run = run_one(program)
    assert run.accuracies == [0.9825, 0.99]
    assert run.seed == 3
    assert 0.2 <= run.seconds < 20


def test_a_goal_that_is_not_reached_has_no_time():
    run = run_one("print('test_accuracy 0.5', flush=True); print('test_accuracy 0.6')")
    assert run == accuracy.Run(3, None, [0.5, 0.6])


def test_only_the_first_process_is_listened_to():
    program = "import sys\nprint('test_accuracy', '0.5' if sys.argv[1] == '0' else '0.999')"
    assert run_one(program, processes=2, epochs=1).accuracies == [0.5]


def test_a_trainer_that_fails_is_named_with_what_it_said():
    with pytest.raises(
        pool.PeerError, match=r"one: ended or was ended after 0 of 2 epochs.*\nno data"
    ):
        run_one("import sys; sys.exit('no data')")


def test_a_trainer_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(accuracy, "SECONDS", 0.3)
    with pytest.raises(pool.PeerError, match="was ended after 0 of 2 epochs"):
        run_one("import time; time.sleep(60)")


def test_every_trainer_runs_once_for_each_seed():
    fast = trainer("print('test_accuracy 0.99')", epochs=1)
    said = []
    runs = accuracy.measure_accuracy(
        [fast, dataclasses.replace(fast, name="two")],
        seeds=2,
        say=said.append,
        goal=0.99,
        pythons={True: sys.executable},
        cores=[CORE],
    )
    assert {name: [run.seed for run in each] for name, each in runs.items()} == {
        "one": [0, 1],
        "two": [0, 1],
    }
    assert len(said) == 4


def test_the_example_accepts_the_flags_it_is_given():
    import cli
    import train

    for each in accuracy.list_trainers(accuracy.Recipe(0.25, 7, 0.2, 3), 10):
        if each.own:
            script, *flags = each.command(1, 2345, 4)
            assert pathlib.Path(script).samefile(train.__file__)
            args = cli.parse(flags)
            assert (args.model, args.dropout, args.devices) == ("cnn3x3", 0, "2")
            assert (args.epochs, args.seed, args.decay) == (each.epochs, 4, "cosine")
            assert (args.epochs, args.learning_rate, args.warmup) == (3, 0.25, 7)
            assert args.label_smoothing == 0.2
            assert args.num_processes == (2 if each.processes == 2 else None)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--cores 0", "--cores: required 2 different ones"),
        ("--cores 0,0", "--cores: required 2 different ones"),
        ("--cores 0,9999", "name two of them, as --cores"),
        ("--cores a,b", "--cores: required 2 different ones"),
        ("--rounds 0", "--rounds: required at least 1, given 0"),
        ("--to-accuracy 99 --max-epochs 0", "--max-epochs: required at least 1, given 0"),
        ("--to-accuracy 0", "--to-accuracy: required a percentage above 0, given 0.0; try 99"),
        ("--to-accuracy nan", "--to-accuracy: required a percentage above 0, given nan; try 99"),
        (
            "--to-accuracy 99 --dataset synthetic",
            "--dataset: required no --to-accuracy; leave one of them out",
        ),
        ("--to-accuracy 99 --slower", "--slower: required no --to-accuracy"),
        ("--seeds 3", "--seeds: required --to-accuracy; add it, as --to-accuracy 99"),
    ],
)
def test_bad_flags_are_refused(flags, words, capsys, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    with pytest.raises(SystemExit):
        compare.parse_arguments(flags.split())
    assert words in capsys.readouterr().err


def test_each_mode_has_its_defaults(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    rate = compare.parse_arguments([])
    assert (rate.rounds, rate.steps, rate.dataset, rate.slower) == (5, 50, "mnist", False)
    assert rate.cores == [0, 1]
    reach = compare.parse_arguments(["--to-accuracy", "99", "--epochs=3"])
    assert (reach.seeds, reach.max_epochs, reach.epochs) == (5, 10, 3)
    assert (reach.learning_rate, reach.warmup, reach.label_smoothing) == (0.14, 150, 0.05)


def test_contenders_are_chosen_by_words():
    args = argparse.Namespace(only="ddp,plain jax", peers_python="python")
    names = [each.name for each in compare.choose_contenders(args, pool.CONTENDERS)]
    assert names == [
        "plain jax (2 devices)",
        "plain jax (2 processes)",
        "PyTorch DDP",
        "PyTorch DDP (usual form)",
        "PyTorch DDP bfloat16",
    ]


def test_without_the_peers_environment_ours_and_plain_jax_are_left():
    args = argparse.Namespace(only=None, peers_python=None)
    chosen = compare.choose_contenders(args, pool.CONTENDERS)
    assert {each.script for each in chosen} == {"txcore_worker.py", "jax_worker.py"}
    with pytest.raises(ValueError, match="nothing to run with --only 'TensorFlow'"):
        compare.choose_contenders(
            argparse.Namespace(only="TensorFlow", peers_python=None), pool.CONTENDERS
        )


def test_the_names_are_unique_and_ours_are_among_them():
    names = [each.name for each in (*pool.CONTENDERS, *pool.SLOWER)]
    assert len(set(names)) == len(names)
    assert set(compare.OURS) <= set(names)
    assert set(compare.OURS) <= {
        each.name for each in accuracy.list_trainers(accuracy.Recipe(0.1, 50, 0, 2), 10)
    }


def test_missing_data_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setenv("TXCORE_DATA", str(tmp_path / "file"))
    (tmp_path / "file").write_text("no folder")

    assert compare.main(["--only", "plain jax"]) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compare.py: no inputs: ")
    assert line.endswith("; or run with --dataset synthetic")


@pytest.mark.slow
def test_txcore_and_plain_jax_compute_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("needs two cores")
    flags = ["--only", "txcore (2 devices),plain jax (2 devices)", "--dataset", "synthetic"]
    flags += ["--cores", ",".join(map(str, cores)), "--rounds", "1", "--steps", "1"]

    assert compare.main([*flags, "--name", "here"]) == 0

    assert "| plain jax (2 devices) |" in capsys.readouterr().out
    results = json.loads((tmp_path / "peers_here.json").read_text())
    assert (tmp_path / "peers_here.png").exists()
    assert results["largest_relative_deviation"]["plain jax (2 devices)"] < 1e-4
    assert results["versions"]["plain jax (2 devices)"]["jax"]
    first = results["first_losses"]["txcore (2 devices)"]
    assert len(first) == 10
    assert len(set(first)) == 10
