"""The command line by itself: help, version, what an error names, `python -m txcore`."""

import subprocess
import sys

import pytest

import txcore as tx
from txcore import cli

NEED_MORE = [[], ["inspect"], ["costs"], ["dump"], ["lock"], ["lock", "check"], ["lock", "update"]]
NEED_MORE += [["launch"]]


@pytest.mark.parametrize("given", NEED_MORE, ids=" ".join)
def test_help_where_nothing_is_given(given, capsys):
    """On stderr, and 2: a script whose variable is empty has checked nothing."""
    assert cli.main(given) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"usage: {' '.join(['txcore', *given])} ")
    assert cli.main([*given, "--help"]) == 0
    assert capsys.readouterr() == (err, "")


@pytest.mark.parametrize(
    "given, command",
    [
        (["prove"], "txcore"),
        (["inspect", "--json"], "txcore inspect"),
        (["inspect", "a"], "txcore inspect"),
        (["inspect", "a:b", "--hlo", "c"], "txcore inspect"),
        (["inspect", "a:b", "--mesh", "x"], "txcore inspect"),
        (["inspect", "a:b", "--html=~nobody-of-this-name/x"], "txcore inspect"),
        (["costs", "--json"], "txcore costs"),
        (["dump", "a:b"], "txcore dump"),
        (["lock", "prove"], "txcore lock"),
        (["lock", "check", "--exact"], "txcore lock check"),
        (["lock", "update", "a:b", "--budget", "data=2MB", "--budget", "data=1"],
         "txcore lock update"),
        (["bench", "paint"], "txcore bench"),
        (["tune", "paint"], "txcore tune"),
        (["launch", "-n", "2"], "txcore launch"),
        (["env", "more"], "txcore"),
    ],
)  # fmt: skip
def test_an_error_of_the_arguments_names_the_commands_help(given, command, capsys):
    assert cli.main(given) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("txcore: error: ")
    assert err.endswith(f" (see {command} --help)\n")
    assert err.count("--help") == 1


def test_an_error_of_a_file_names_no_help(capsys):
    assert cli.main(["inspect", "--hlo", "absent.txt"]) == 2
    assert capsys.readouterr().err == (
        "txcore: error: cannot read absent.txt: No such file or directory\n"
    )


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr() == (f"txcore {tx.__version__}\n", "")


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "txcore", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"txcore {tx.__version__}\n", "")


def test_home_is_expanded(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["inspect", "--hlo=~/absent.txt"]) == 2
    assert f"cannot read {tmp_path}/absent.txt: " in capsys.readouterr().err


def test_an_error_of_its_own_is_no_failed_proof(monkeypatch, capsys):
    """Python would end with 1, which says that something is unexplained."""

    def fails(options):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(cli.env, "print_environment", fails)
    assert cli.main(["env"]) == 2
    *shown, last = capsys.readouterr().err.splitlines()
    assert shown[0] == "Traceback (most recent call last):"
    assert shown[-1] == "ZeroDivisionError: ours"
    assert last == "txcore: error: this is a defect of txcore: report it"
