"""Files that commands read: regular ones, or stdin where it is asked for; nothing waits."""

import io
import os
import subprocess
import sys
import types

import pytest

from txcore import cli

HLO = """HloModule m, num_partitions={0}
ENTRY %e (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %r = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={{}}
}}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    (tmp_path / "m.hlo").write_text(HLO.format(4))
    (tmp_path / "sine.py").write_text(
        "import jax, jax.numpy as jnp\ndef build():\n  return jnp.sin, (jnp.ones(3),)\n"
    )


NO_FILE = "it is a pipe, and no regular file"
REFUSED = {
    "hlo": (["inspect", "--hlo", "pipe"], f"cannot read pipe: {NO_FILE}: give a file, or - for"),
    "a device": (["inspect", "--hlo", "/dev/zero"], "it is a device, and no regular file"),
    "against": (["inspect", "--hlo", "m.hlo", "--against", "pipe"], f"cannot read pipe: {NO_FILE}"),
    "both": (["inspect", "--hlo", "-", "--against", "-"], "cannot both be - (stdin): name a file"),
    "a lock": (["lock", "check", "sine.py:build", "--file", "pipe"], NO_FILE),
    "a lock to write": (["lock", "update", "sine.py:build", "--file", "pipe"], NO_FILE),
    "a factory": (["inspect", "pipe.py:build"], "there is no file pipe.py"),
    "tuning": (["tune", "dense", "--cache", "pipe"], f"cannot be read ({NO_FILE})"),
    "a target": (["inspect", "sine.py:build", "--target", "cuda:h100:99999999x8"],
                 "needs at most 65536 devices, got 799999992"),
    "a target of digits": (["inspect", "sine.py:build", "--target", f"cpu:{'9' * 5000}"],
                           f"got '{'9' * 40}': write targets as"),
    "devices": (["inspect", "sine.py:build", "--devices", "100000"], "at most 65536 devices"),
    "digits": (["inspect", "sine.py:build", "--devices", "9" * 5000],
               "needs at most 18 digits, but got 5000"),
    "a mesh of digits": (["inspect", "--hlo", "m.hlo", "--mesh", f"data={'9' * 5000}"],
                         "needs axes with sizes"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_at_once(name, capsys):
    arguments, reason = REFUSED[name]
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert len(said) < 400


@pytest.mark.parametrize("option", ["--hlo", "--against"])
def test_stdin(option, monkeypatch, capsys):
    text = HLO.format(4).encode()
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(text)))
    arguments = ["--hlo", "-"] if option == "--hlo" else ["--hlo", "m.hlo", "--against", "-"]
    assert cli.main(["inspect", *arguments]) == 1
    assert "1 of 1 collective unexplained" in capsys.readouterr().out


def test_stdin_is_bounded_too(monkeypatch, capsys):
    endless = types.SimpleNamespace(read=lambda count: b"x" * count)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=endless))
    assert cli.main(["inspect", "--hlo", "-", "--max-bytes", "1000"]) == 2
    assert "- is longer than 1000 bytes: raise --max-bytes" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["inspect", "--hlo", "-"]) == 2
    assert "cannot read -: Bad file descriptor" in capsys.readouterr().err


@pytest.mark.parametrize("devices", [999_999_937, 1_000_000_000])  # the first is a prime
def test_a_page_of_a_billion_devices(devices, tmp_path):
    """The page's list of a group's members took 8 GB, in a process that may have 2."""
    (tmp_path / "m.hlo").write_text(HLO.format(devices))
    limited = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30)); "
    arguments = ["inspect", "--hlo", "m.hlo", "--mesh", f"data={devices}", "--html", "m.html"]
    done = subprocess.run(
        [sys.executable, "-c", f"{limited}from txcore.cli import main; exit(main({arguments}))"],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 1, done.stderr
    page = (tmp_path / "m.html").read_text()
    assert f"1 group of {devices:,}: 0, 1, 2, …, {devices - 1}" in page
