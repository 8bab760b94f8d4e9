"""The MNIST script: the same curve on any number of devices and processes, and its results."""

import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import cli
import curves
import jax
import models
import numpy as np
import pytest
import train
from data import batches, dataset
from processes import finish, free_port

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "mnist" / "train.py"


def run(tmp_path, *args, script=train, code=0):
    """Run the script in this process; return what it wrote."""
    path = tmp_path / "results.json"
    assert script.main([*map(str, args), "--results", str(path)]) == code
    return json.loads(path.read_text())


def run_processes(tmp_path, count, *args, script=train, x64=False):
    """Run the script in real processes over gloo, started by hand; return rank 0's results."""
    flags = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", str(count)]
    paths = [tmp_path / f"rank{i}.json" for i in range(count)]
    ranks = [
        subprocess.Popen(
            [sys.executable, script.__file__, *map(str, args), *flags]
            + ["--process-id", str(i), "--results", paths[i]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, "JAX_ENABLE_X64": str(int(x64))},
        )
        for i in range(count)
    ]
    codes, outputs, _ = zip(*finish(*ranks, deadline_s=300), strict=True)
    assert codes == (0,) * count, outputs
    assert not paths[1].exists()  # rank 0 alone writes
    assert "test accuracy" not in outputs[1]
    return json.loads(paths[0].read_text())


def check_one_curve(tmp_path, *args, rtol, x64=False):
    """Train on 1, 2 and 4 devices and in 2 processes; compare the 100 losses."""
    fixed = ["--dataset", "digits", "--steps", "100", "--eval-every", "100", "--no-audit"]
    args = (*fixed, *args)
    with jax.enable_x64(x64):
        one, *others = (run(tmp_path, *args, "--devices", n, script=curves) for n in (1, 2, 4))
    others.append(run_processes(tmp_path, 2, *args, "--devices", "2", script=curves, x64=x64))
    reference = one["loss_curve"]
    assert len(reference) == 100
    assert np.mean(reference[-5:]) < reference[0] / 2
    for other in others:
        np.testing.assert_allclose(other["loss_curve"], reference, rtol=rtol)


EXTRA_CNN = pytest.param("small-cnn", marks=pytest.mark.extra)


@pytest.mark.parametrize("model", [EXTRA_CNN, "mlp"], ids=["dropout", "without"])
def test_100_steps_in_float64_give_one_curve(tmp_path, model):
    """The plans are exact: only rounding differs, 1e-15 here, whatever the model.

    In float32 it is 2e-7 until by chance a ReLU's input changes its sign, or another maximum
    is the largest; from there on the trajectory is another one. (Weights changed by 1e-7 in
    float64 move the loss by 3e-4 at step 100.) In float64 that chance is smaller
    as its rounding is, by 5e8. Every 32nd batch is masked.
    """
    args = ["--model", model, "--batch-size", "16", "--train-size", "500", "--warmup", "20"]
    check_one_curve(tmp_path, *args, rtol=1e-10, x64=True)


@pytest.mark.parametrize(
    "dropout", ["0.25", pytest.param("0", marks=pytest.mark.extra)], ids=["dropout", "without"]
)
def test_100_steps_in_float32_give_one_curve(tmp_path, dropout):
    """At the settings of the accuracy run, with a model whose loss is smooth (see above)."""
    check_one_curve(tmp_path, "--model", "softmax", "--dropout", dropout, rtol=1e-4)


@pytest.mark.parametrize("model", ["small-cnn", pytest.param("mlp", marks=pytest.mark.extra)])
def test_layers_in_parts_give_the_curve_of_one_device(tmp_path, model):
    """Channels and features over "model", with dropout of the parts; in float64, as above."""
    args = ["--model", model, "--dataset", "digits", "--steps", "20", "--eval-every", "20"]
    args += ["--warmup", "0"]
    with jax.enable_x64(True):
        one, *others = (
            run(tmp_path, *args, *way, script=curves)
            for way in (["--devices", "1"], ["--mesh", "data=2,model=2"], ["--mesh", "model=4"])
        )
    assert np.mean(one["loss_curve"][-5:]) < 0.98 * one["loss_curve"][0]
    for other in others:
        np.testing.assert_allclose(other["loss_curve"], one["loss_curve"], rtol=1e-9)
        assert other["test_accuracy"] == one["test_accuracy"]
        assert other["audit_ok"]
        assert {row["origin"] for row in other["collectives"]} == {"txcore"}
    tags = [tag for row in others[1]["collectives"] for tag in row["tags"]]
    pairs = 2 if model == "small-cnn" else 1  # a sum each forward, and back into all but the first
    assert sorted(tags) == ["psum/row"] * pairs + ["vary/enter"] * (pairs - 1)


def test_a_run_goes_on_with_its_layers_split_otherwise(tmp_path):
    args = ["--model", "mlp", "--dataset", "digits", "--no-audit", "--eval-every", "20"]
    saving = ["--checkpoint-dir", tmp_path / "saved", "--save-every", "10"]
    whole = run(tmp_path, *args, "--steps", "20", "--devices", "1")
    run(tmp_path, *args, "--steps", "10", "--mesh", "data=2,model=2", *saving)
    rest = run(tmp_path, *args, "--steps", "20", "--mesh", "model=4", *saving, "--resume", "must")
    assert rest["first_step"] == 11
    np.testing.assert_allclose(rest["loss_curve"], whole["loss_curve"][10:], rtol=1e-5)
    assert rest["test_accuracy"] == pytest.approx(whole["test_accuracy"], abs=0.003)


def numpy_curve(steps, rate=0.02, warmup=100, momentum=0.9):
    """The losses of softmax regression by the script's rule, in float64 and without padding."""
    digits = dataset.load("digits")
    params = models.init((), 0)["dense0"]
    w, b = np.float64(params["w"]), np.float64(params["b"])
    dw, db = np.zeros_like(w), np.zeros_like(b)
    plan = {"batch_size": 128, "seed": 0}
    epochs = (
        batches.epoch_batches(digits.train_images, digits.train_labels, epoch=e, **plan)
        for e in itertools.count()
    )
    losses = []
    for step, batch in zip(range(steps), itertools.chain.from_iterable(epochs), strict=False):
        real = batch["mask"] != 0
        x, label = np.float64(batch["image"][real]).reshape(real.sum(), -1), batch["label"][real]
        log_p = x @ w + b - np.log(np.exp(x @ w + b).sum(1, keepdims=True))
        losses.append(-log_p[range(len(x)), label].mean())
        error = (np.exp(log_p) - np.eye(10)[label]) / len(x)
        dw, db = momentum * dw + x.T @ error, momentum * db + error.sum(0)
        now = rate * min(1, (step + 1) / warmup)
        w, b = w - now * dw, b - now * db
    return losses


def test_100_steps_are_those_of_numpy(tmp_path):
    """What all plans could have wrong alike: the mask, the rate, the order of the examples."""
    args = ["--model", "softmax", "--dropout", "0", "--dataset", "digits", "--steps", "100"]
    results = run(tmp_path, *args, "--devices", "4", script=curves)
    np.testing.assert_allclose(results["loss_curve"], numpy_curve(100), rtol=1e-4)


@pytest.mark.parametrize("model", [EXTRA_CNN, "mlp"], ids=["dropout", "without"])
def test_two_epochs_of_250_with_a_masked_last_batch(tmp_path, model):
    """The 16 steps are too early in the warm-up for a changed sign to show."""
    args = ["--model", model, "--dataset", "digits", "--epochs", "2"]
    args += ["--train-size", "250", "--batch-size", "32"]
    one = run(tmp_path, *args, "--devices", "1", script=curves)
    assert len(one["loss_curve"]) == 16  # 7 batches of 32 and one of 26, twice
    others = [run(tmp_path, *args, "--devices", "4", script=curves)]
    others.append(run_processes(tmp_path, 2, *args, "--devices", "2", script=curves))
    for other in others:
        np.testing.assert_allclose(other["loss_curve"], one["loss_curve"], rtol=1e-5)
        assert abs(other["test_accuracy"] - one["test_accuracy"]) <= 0.001


@pytest.mark.parametrize(
    "model,precision",
    [
        *((model, "float32") for model in train.models.MODELS),
        ("cnn", "bfloat16"),
        *(
            pytest.param(model, "bfloat16", marks=pytest.mark.extra)
            for model in train.models.MODELS
            if model != "cnn"
        ),
    ],
)
def test_every_model_learns_and_is_proved(tmp_path, model, precision):
    results = run(
        tmp_path,
        *["--model", model, "--precision", precision, "--devices", "2", "--dataset", "digits"],
        *["--optimizer", "adamw", "--warmup", "0", "--steps", "20", "--eval-every", "20"],
        *["--batch-size", "32"],
    )
    assert np.mean(results["loss_curve"][-3:]) < 0.8 * results["loss_curve"][0]
    assert results["audit_ok"]
    assert {row["origin"] for row in results["collectives"]} == {"txcore"}
    assert {row["kind"] for row in results["collectives"]} == {"all-reduce"}


def test_the_bytes_of_the_cnn_step_are_those_of_its_gradients(tmp_path):
    args = ["--model", "cnn", "--dataset", "digits", "--steps", "1"]
    results = run(tmp_path, *args, "--devices", "2")
    conv, dense = 25 * 32 + 32 + 25 * 32 * 64 + 64, 3136 * 128 + 128 + 128 * 10 + 10
    payload = sum(row["payload_bytes"] * row["trips"] for row in results["collectives"])
    assert payload == 4 * (conv + dense) + 4  # and the loss
    assert [row["kind"] for row in results["collectives"]] == ["all-reduce"]
    assert run(tmp_path, *args, "--devices", "1")["collectives"] == []


def test_what_it_prints_and_writes(tmp_path, capsys):
    results = run(
        tmp_path,
        *["--model", "mlp", "--dataset", "digits", "--devices", "2", "--epochs", "2"],
        *["--lr-scaling", "linear", "--warmup", "5", "--log-dir", tmp_path / "logs"],
    )
    out = capsys.readouterr().out
    assert "simulating 2 CPU devices" in out
    assert "mlp on digits: 2 x cpu, 1 process(es), global batch 128, float32" in out
    assert re.search(r"^proved: \d collectives?, .* all declared .* nothing was added$", out, re.M)
    assert f"test accuracy {100 * results['test_accuracy']:.2f}% on digits" in out
    assert set(results) == {
        "test_accuracy",
        "loss_curve",
        "first_step",
        "images_per_second",
        "compile_seconds",
        "seconds_to_99",
        "audit_ok",
        "collectives",
    }
    assert results["seconds_to_99"] is None
    assert results["first_step"] == 1
    assert results["images_per_second"] > 0
    assert results["compile_seconds"] > 0
    lines = (tmp_path / "logs" / "train.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    curve = [r["metrics"]["loss"] for r in records if r["kind"] == "step"]
    assert curve == results["loss_curve"]
    assert [r["kind"] for r in records if r["kind"] != "step"] == ["eval", "eval", "end"]


def test_it_is_resumed_where_it_was(tmp_path, capsys):
    args = ["--model", "mlp", "--dataset", "digits", "--batch-size", "64", "--no-audit"]
    saving = ["--checkpoint-dir", tmp_path / "saved", "--save-every", "10", "--keep", "2"]
    whole = run(tmp_path, *args, "--steps", "30", "--eval-every", "25")
    run(tmp_path, *args, "--steps", "17", *saving)
    rest = run(tmp_path, *args, "--steps", "30", "--eval-every", "25", *saving, "--resume", "must")
    assert rest["first_step"] == 18
    assert rest["loss_curve"] == whole["loss_curve"][17:]
    assert rest["test_accuracy"] == whole["test_accuracy"]
    assert sorted(p.name for p in (tmp_path / "saved").glob("s*")) == [
        "step_00000020",
        "step_00000030",
    ]
    run(tmp_path, *args, *saving, "--resume", "never", code=2)
    assert "has checkpoints already, the newest step_00000030" in capsys.readouterr().err


def test_home_is_expanded_in_paths(tmp_path, monkeypatch):
    """`--results=~/x` reaches the script as it is; a folder named ~ is nobody's wish."""
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("results", "log_dir", "checkpoint_dir", "data_dir")
    args = cli.parse([f"--{name.replace('_', '-')}=~/{name}" for name in names])
    cli.check(args)
    assert [getattr(args, name) for name in names] == [str(tmp_path / name) for name in names]


def test_without_audit(tmp_path, capsys):
    args = ["--model", "dense", "--dataset", "digits", "--devices", "2", "--steps", "1"]
    results = run(tmp_path, *args, "--no-audit")
    assert results["audit_ok"] is None
    assert "proof" not in capsys.readouterr().out


BAD = [
    (["--devices", "3", "--batch-size", "64"], "--batch-size 64 cannot be shared equally by 3"),
    (["--devices", "0"], "--devices needs a number from 1 on, or all, got '0'"),
    (["--devices", "two"], "--devices needs a number from 1 on, or all, got 'two'"),
    (["--devices", "99"], "--devices 99: this jax has started with 8 devices"),
    (["--mesh", "data=2,pipe=2"], "a pipeline needs layers that are alike"),
    (["--mesh", "data=2,model=0"], "--mesh needs sizes of the axes data and model, as data=2,"),
    (["--mesh", "data"], "--mesh needs sizes of the axes data and model, as data=2,model=2, got"),
    (["--mesh", "data=2", "--devices", "3"], "--mesh data=2 needs 2 devices, got --devices 3"),
    (["--mesh", "model=3"], "dim 0 of params['dense0']['b'], shape (128,), divisible by the 3"),
    (["--batch-size", "0"], "--batch-size 0 cannot be shared equally"),
    (["--dropout", "1"], "--dropout needs a number from 0 to below 1, got 1.0"),
    (["--model", "mlp", "--dropout", "0.5"], "--dropout 0.5: model mlp has no dropout"),
    (["--learning-rate", "-1"], "--learning-rate needs a number from 0 on, got -1.0"),
    (["--warmup", "-1"], "--warmup needs a count from 0 on, got -1"),
    (
        ["--decay", "cosine", "--steps", "100"],
        "--decay cosine needs more steps than the warm-up's 100, got 100: train longer, or make "
        "--warmup shorter",
    ),
    (["--steps", "-1"], "--steps needs a count from 0 on, got -1"),
    (["--eval-every", "-5"], "--eval-every needs a count from 1 on, got -5"),
    (["--label-smoothing", "1.5"], "--label-smoothing needs a number from 0 to 1, got 1.5"),
    (["--seed", "-1"], "--seed needs a number from 0 to 4294967295, got -1"),
    (["--eval-every", "0"], "--eval-every needs a count from 1 on, got 0"),
    (["--epochs", "-1"], "--epochs needs a count from 0 on, got -1"),
    (["--train-size", "0"], "--train-size needs a number from 1 to 1437, got 0"),
    (["--num-processes", "2"], "coordinator, process_id is missing"),
    (
        ["--coordinator", "here", "--num-processes", "2", "--process-id", "0"],
        "tx.initialize needs coordinator= 'host:port', got 'here'",
    ),
    (
        ["--coordinator", "127.0.0.1:1", "--num-processes", "2", "--process-id", "2"],
        "tx.initialize needs process_id= from 0 to 1 for num_processes=2, got 2",
    ),
    (["--resume", "must"], "--resume needs --checkpoint-dir: without it nothing is saved"),
    (["--keep", "5"], "--keep needs --checkpoint-dir: without it nothing is saved"),
    (["--save-every", "9"], "--save-every needs --checkpoint-dir: without it nothing is saved"),
    (["--results", "~nobody-such/r"], "--results needs a path, but '~nobody-such/r' is no user's"),
    (["--data-dir", "x"], "--data-dir is for MNIST, but --dataset digits takes scikit-learn's"),
    (["--results", "/proc/nothing/r.json"], "/proc/nothing"),
    (["--log-dir", "/proc/nothing"], "/proc/nothing"),
]


@pytest.mark.parametrize("args,text", BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_arguments_end_in_one_line(args, text, capsys):
    length = [] if "--epochs" in args else ["--steps", "1"]
    assert train.main(["--dataset", "digits", "--model", "dense", *length, *args]) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.startswith("train.py: ")
    assert err.count("\n") == 1


def test_the_script_shows_no_traceback(tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"not gzip")
    for name in ("train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"{name}-ubyte.gz").write_bytes(b"not gzip")
    for args in (["--data-dir", tmp_path], ["--devices", "2.5"], ["--batch-size", "7"]):
        done = subprocess.run(
            [sys.executable, SCRIPT, "--data-dir", tmp_path, "--devices", "2", *args],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("train.py: ")
        assert done.stderr.count("\n") == 1


def test_minimal_dp_is_run():
    script = ROOT / "examples" / "minimal_dp.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", script], capture_output=True, text=True, check=True
    )
    assert re.search(r"^w = 2\.\d+, loss", done.stdout)
    assert "proved: 1 collective, 8 B payload a call" in done.stdout


def test_zero_mlp_is_run():
    script = ROOT / "examples" / "zero_mlp.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", script], capture_output=True, text=True, check=True
    )
    losses = re.findall(r"^shard=\w+: loss (\S+); a device holds (\S+) MB", done.stdout, re.M)
    assert [held for _, held in losses] == ["1.58", "1.58", "1.58", "0.39"]
    assert len({loss for loss, _ in losses}) == 1
    assert done.stdout.count("proved: ") == 4


def test_pipeline_two_stage_is_run():
    script = ROOT / "examples" / "pipeline_two_stage.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", script], capture_output=True, text=True, check=True
    )
    losses = [float(x) for x in re.findall(r"^  loss (\S+) after 5 steps", done.stdout, re.M)]
    assert len(losses) == 5
    assert 0.1 < losses[0] < 4
    assert max(losses) - min(losses) < 1e-4
    assert done.stdout.count("as the plan predicts; nothing was added") == 4
    assert "1f1b: 2 stages, 4 microbatches, 6 ticks, bubble 1/5" in done.stdout
