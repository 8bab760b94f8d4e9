"""`txcore tune` and what `txcore env` says of kernels."""

import pytest

from txcore import cli
from txcore.kernels.dispatch.tuning_file import Entry, read_entries, write_entries
from txcore.kernels.tuning import measure, timing


@pytest.fixture
def fast(monkeypatch):
    """Measure without a clock: each candidate takes 3, 2, 1 ... microseconds."""

    def alternate(calls, rounds):
        return {name: float(len(calls) - i) for i, name in enumerate(calls)}

    monkeypatch.setattr(timing, "alternate_calls", alternate)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    path = tmp_path / "txcore" / "tuning.json"
    monkeypatch.setenv("TXCORE_TUNING", str(path))
    return path


def test_it_measures_and_writes(cache, capsys):
    assert cli.main(["tune", "--shapes", "logits-b64", "loss-b64", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert "dense logits-b64 float32\n  xla" in out
    assert "cross_entropy loss-b64 float32\n  xla" in out
    assert out.count(" µs  1.00x  fastest") == 2
    assert out.endswith(f"written to {cache}\n")
    entries = read_entries(cache)
    assert {key.partition("|")[0] for key in entries} == {"dense", "cross_entropy"}
    assert all(entry.implementation == "xla" for entry in entries.values())
    assert {entry.machine for entry in entries.values()} == {measure.describe_machine()}


def test_what_it_wrote_is_what_runs(fast, cache, capsys):
    def env():
        assert cli.main(["env"]) == 0
        lines = capsys.readouterr().out.splitlines()
        return next(line.split() for line in lines if line.split()[:2] == ["dense", "logits-b64"])

    before = env()
    assert before[-1] == "heuristic"
    assert cli.main(["tune", "--shapes", "logits-b64"]) == 0
    table = capsys.readouterr().out.splitlines()
    (fastest,) = (line for line in table if line.endswith("1.00x  fastest"))
    after = env()
    assert after[-1] == str(cache)
    assert after[2:-1] == fastest.split()[: len(after) - 3]


def test_it_adds_to_what_is_there(fast, cache):
    other = Entry("xla", {}, {"xla": 1.0}, "0.10.2", "another machine")
    write_entries(cache, {"another|key": other})
    assert cli.main(["tune", "cross_entropy", "--shapes", "loss-b64"]) == 0
    assert cli.main(["tune", "--shapes", "loss-b64", "--dtype", "bfloat16", "--forward"]) == 0
    entries = read_entries(cache)
    assert entries["another|key"] == other
    assert sorted(key.split("|")[2] for key in entries if "|cpu|" in key) == [
        "bfloat16,int32",
        "float32,int32",
    ]


@pytest.mark.parametrize("option", [["--cache", "named.json"], ["--dry-run"]])
def test_a_named_file_and_none(option, fast, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["tune", "--shapes", "loss-b64", *option]) == 0
    assert not cache.exists()
    assert (tmp_path / "named.json").exists() == (option[0] == "--cache")
    assert ("written to" in capsys.readouterr().out) == (option[0] == "--cache")


def test_what_was_measured_outlives_an_interruption(cache, monkeypatch, capsys):
    turns = []

    def alternate(calls, rounds):
        if turns:
            raise KeyboardInterrupt
        turns.append(1)
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(timing, "alternate_calls", alternate)
    assert cli.main(["tune", "--shapes", "loss-b64", "logits-b64"]) == 130
    assert len(read_entries(cache)) == 1


BAD = {
    "no such op": (["tune", "conv3d"], "tune needs ops among conv2d, dense, "),
    "no such shape": (["tune", "--shapes", "x"], "tune needs --shapes among cnn-conv1-b64, "),
    "a shape of another op": (
        ["tune", "dense", "--shapes", "loss-b64"],
        "--shapes loss-b64 is of cross_entropy, but OP names dense: leave one of the two out",
    ),
    "no such dtype": (["tune", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    "no rounds": (["tune", "--rounds", "0"], "needs a number of at least 1, but got '0'"),
    "both passes": (["tune", "--grad", "--forward"], "not allowed with argument --grad"),
    "no such implementation": (["tune", "--implementation", "cuda"], "invalid choice: 'cuda'"),
    "a folder": (
        ["tune", "--shapes", "loss-b64", "--cache", "."],
        "the tuning file . cannot be read (Is a directory): delete it, and run `txcore tune`",
    ),
    "a damaged file": (
        ["tune", "--shapes", "loss-b64", "--cache", "damaged.json"],
        "the tuning file damaged.json needs JSON, got other text (",
    ),
    "a file that cannot be": (
        ["tune", "--shapes", "loss-b64", "--cache", "damaged.json/x.json"],
        "the tuning file damaged.json/x.json cannot be read (Not a directory)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exits_2(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.json").write_text("{")
    monkeypatch.setattr(timing, "alternate_calls", None)  # nothing is measured
    arguments, message = BAD[name]
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("txcore: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_no_file_is_refused_before_measuring(monkeypatch, capsys):
    monkeypatch.setenv("TXCORE_TUNING", "")
    monkeypatch.setattr(timing, "alternate_calls", None)
    assert cli.main(["tune", "--shapes", "loss-b64"]) == 2
    text = "TXCORE_TUNING is empty: name a file by --cache, or give --dry-run"
    assert text in capsys.readouterr().err


class TestEnv:
    def test_the_choice_of_kernels(self, monkeypatch, capsys):
        monkeypatch.setenv("TXCORE_TUNING", "")
        assert cli.main(["env"]) == 0
        out = capsys.readouterr().out
        rest, kernels = out.split("kernels for float32, and why\n")
        options = rest.split("XLA options of a step\n")[1].splitlines()
        assert options[-3].split()[0] == "float32"
        assert "ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE" in options[-3]
        assert kernels.splitlines()[0].split() == ["tuning", "file", "none"]
        (line,) = (line for line in out.splitlines() if "cnn3x3-conv2-b64" in line)
        assert line.startswith("conv2d")
        assert "xla(form=winograd, on_cpu=True, images=8)" in line
        assert line.split()[-1] in ("heuristic", "recorded")

    def test_a_damaged_file_is_named(self, cache, capsys):
        cache.parent.mkdir()
        cache.write_text("[")
        assert cli.main(["env"]) == 0
        out = capsys.readouterr().out
        assert f"tuning file  {cache}" in out
        assert f"refused      TuningError: the tuning file {cache} needs JSON" in out
