"""The MNIST script on ranks that were started differently: refused by flag, or equal."""

import os
import pathlib
import struct
import subprocess
import sys
import threading

import agreement
import cli
import numpy as np
import pytest
import train
from data import dataset
from processes import finish, free_port
from watch_fakes import Coordinator

from txcore.launch import MismatchError, preflight

ROOT = pathlib.Path(__file__).resolve().parents[2]
DIGITS = ["--dataset", "digits", "--model", "dense", "--steps", "4", "--batch-size", "64"]
# A second value for every argument that decides what is computed.
OTHER = {
    "model": "mlp",
    "dropout": "0.1",
    "devices": "2",
    "batch_size": "64",
    "learning_rate": "0.5",
    "optimizer": "adamw",
    "lr_scaling": "linear",
    "warmup": "7",
    "decay": "cosine",
    "label_smoothing": "0.1",
    "steps": "5",
    "epochs": "2",
    "eval_every": "3",
    "accumulate": "2",
    "shard": "optimizer",
    "compress": "int8",
    "algorithm": "ring",
    "bucket_mb": "0.5",
    "sync_every": "4",
    "outer": "nesterov",
    "delay": "1",
    "reduction": "adasum",
    "precision": "bfloat16",
    "mesh": "data=1,model=2",
    "seed": "1",
    "dataset": "digits",
    "train_size": "500",
    "checkpoint_dir": "saved",
    "save_every": "9",
    "keep": "5",
    "resume": "must",
    "on_nonfinite": "skip",
    "audit": "--no-audit",
}


def other_arguments(name):
    flag = f"--{name.replace('_', '-')}"
    return ["--no-audit"] if name == "audit" else [flag, OTHER[name]]


def compare(*facts):
    """Let each rank compare its facts; return what each raises, by rank."""
    coordinator = Coordinator(len(facts))
    raised = {}

    def run(rank):
        try:
            preflight.compare_facts(coordinator, rank, len(facts), "f/0/", "args", facts[rank], 5)
        except RuntimeError as error:
            raised[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(facts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return raised


def test_every_argument_is_compared_or_a_ranks_own():
    assert set(vars(cli.parse([]))) == OTHER.keys() | agreement.OWN


@pytest.mark.parametrize("name", OTHER)
def test_an_argument_that_differs_is_refused_by_its_flag(name):
    usual = agreement.facts_of_arguments(cli.parse([]))
    odd = agreement.facts_of_arguments(cli.parse(other_arguments(name)))
    raised = compare(usual, odd)
    assert sorted(raised) == [0, 1]
    assert {type(error) for error in raised.values()} == {MismatchError}
    flag = f"--{name.replace('_', '-')}"
    before, after = usual[flag], odd[flag]
    for error in raised.values():
        assert str(error).startswith(
            "the ranks would run different programs: rank 1 differs from rank 0\n"
            f"{flag}:\n  --- rank 0\n  +++ rank 1\n  -{before}\n  +{after}\nNothing was run."
        )


@pytest.mark.parametrize("name", sorted(agreement.OWN))
def test_what_is_a_ranks_own_may_differ(name):
    odd = cli.parse([])
    setattr(odd, name, "of this rank")
    facts = [agreement.facts_of_arguments(args) for args in (cli.parse([]), odd)]
    assert compare(*facts) == {}


@pytest.mark.parametrize("odd", ["one pixel", "one label", "the order", "one fewer", "the name"])
def test_data_that_differ_are_refused(odd):
    images = np.random.default_rng(0).normal(size=(8, 28, 28, 1)).astype(np.float32)
    labels = np.arange(8, dtype=np.int32)
    usual = dataset.Dataset("mnist", images, labels, images, labels)
    changed_images, changed_labels, name, order = (
        images.copy(),
        labels.copy(),
        "mnist",
        np.arange(8),
    )
    if odd == "one pixel":
        changed_images[3, 5, 7, 0] = np.nextafter(images[3, 5, 7, 0], np.float32(9))
    elif odd == "one label":
        changed_labels[7] = 3
    elif odd == "the order":
        order = order[::-1]
    elif odd == "one fewer":
        order = order[:7]
    else:
        name = "digits"
    other = dataset.Dataset(name, changed_images[order], changed_labels[order], images, labels)
    facts = [agreement.facts_of_data(data) for data in (usual, other)]
    (first, second) = compare(*facts).values()
    assert str(first) == str(second)
    assert ("data set:" if odd == "the name" else "training examples:") in str(first)


def run_ranks(*arguments, **environment):
    """Run a rank for each list of arguments, by hand over gloo; return (code, out, err) of each."""
    port, world = free_port(), len(arguments)
    own = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "TXCORE_DATA")}
    flags = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(world)]
    ranks = [
        subprocess.Popen(
            [sys.executable, train.__file__, *map(str, args), *flags, "--process-id", str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=own | environment,
        )
        for rank, args in enumerate(arguments)
    ]
    return finish(*ranks)


def refusals(ended):
    """Return the one line with which every rank refused."""
    assert [code for code, _, _ in ended] == [2, 2], ended
    (line,) = {err.strip().splitlines()[-1] for _, _, err in ended}
    assert line.startswith("train.py: the ranks would run different programs: rank 1 differs from ")
    return line


@pytest.mark.slow
@pytest.mark.parametrize(
    "odd, text",
    [
        (["--train-size", "500"], "--train-size: --- rank 0 +++ rank 1 -not given +500 Nothing"),
        (["--eval-every", "3"], "--eval-every: --- rank 0 +++ rank 1 -not given +3 Nothing was"),
        # refused by this rank alone, were they not compared before
        (["--warmup", "-1"], "--warmup: --- rank 0 +++ rank 1 -100 +-1 Nothing was run."),
    ],
)
def test_real_ranks_with_another_argument(odd, text):
    assert text in refusals(run_ranks(DIGITS, [*DIGITS, *odd]))


def write_data(folder, **changed):
    """Write 30 and 10 images with labels; `changed` replaces a file's labels."""
    folder.mkdir()
    for part, count in (("train", 30), ("t10k", 10)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
        labels = changed.get(part, np.arange(count, dtype=np.uint8) % 10)
        header = struct.pack(">4I", 0x803, *images.shape)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">2I", 0x801, len(labels))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return ["--model", "dense", "--steps", "1", "--data-dir", folder]


@pytest.mark.slow
def test_real_ranks_with_other_data(tmp_path):
    """The same flags, other folders: one label of 30 differs."""
    labels = np.arange(30, dtype=np.uint8) % 10
    labels[29] = 8
    usual, odd = write_data(tmp_path / "0"), write_data(tmp_path / "1", train=labels)
    line = refusals(run_ranks(usual, odd))
    assert "training examples: --- rank 0 +++ rank 1 -30, sha256 " in line
    assert "test examples" not in line


@pytest.mark.slow
def test_a_real_rank_that_cannot_read_its_data(tmp_path):
    """It refuses by itself; the other one, which waits for it, ends too and says why."""
    usual, odd = write_data(tmp_path / "0"), write_data(tmp_path / "1")
    (tmp_path / "1" / "train-labels-idx1-ubyte").write_bytes(b"bad")
    (first, _, told), (second, _, refused) = run_ranks(usual, odd)
    assert (first, second) == (70, 2)
    reason = "1/train-labels-idx1-ubyte: required a header of 8 bytes, found 3 bytes"
    assert reason in refused
    assert "rank 1" in told
    assert reason in told
