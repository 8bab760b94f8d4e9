"""The user's program: read from modules and files, and its own line named where it fails."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from txcore import cli

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEP = """
import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

@dataclasses.dataclass
class Config:
    rows: int = 8

def build(mesh):
    import helper_of_step  # while it is built, not at the import
    x = jax.ShapeDtypeStruct((Config().rows,), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    total = lambda x: jax.lax.psum(x * helper_of_step.scale, "data")
    return jax.shard_map(total, mesh=mesh, in_specs=P("data"), out_specs=P()), (x,)
"""
FAILS = """
import json

import jax.numpy as jnp


def broken():
    raise KeyError("no data\\nsecond line")


def builds_badly():
    return broken()


def calls_a_library():
    json.loads("{")


def traces_badly():
    def step(x):
        return x.nonsense
    return step, (jnp.ones(3),)


def quits_while_traced():
    def step(x):
        raise SystemExit(0)
    return step, (jnp.ones(3),)
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "step_of_user.py").write_text(STEP)
    (tmp_path / "sub" / "helper_of_step.py").write_text("scale = 2.0\n")
    (tmp_path / "fails_of_user.py").write_text(FAILS)
    (tmp_path / "bad_import.py").write_text("import fails_of_user\n\n\nfails_of_user.absent()\n")
    (tmp_path / "bad_syntax.py").write_text("a = 1\nb = = 2\n")
    monkeypatch.chdir(tmp_path)
    before, path = {*sys.modules}, [*sys.path]
    yield tmp_path
    assert sys.path == path
    for name in {*sys.modules} - before:
        if (
            getattr(sys.modules[name], "__file__", None)
            and str(tmp_path) in sys.modules[name].__file__
        ):
            del sys.modules[name]


@pytest.mark.parametrize(
    "form", ["sub/step_of_user.py", "{}/sub/step_of_user.py", "~/step_of_user.py"]
)
def test_a_file_and_a_factory(form, programs, monkeypatch, capsys):
    """Its siblings are found, as by `python FILE.py`, also while it is built and traced."""
    monkeypatch.setenv("HOME", str(programs / "sub"))
    factory = f"{form.format(programs)}:build"
    for _ in range(2):  # once imported, it is there
        assert cli.main(["inspect", factory, "--mesh", "data=4", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["collectives"]
        assert [row["kind"] for row in rows] == ["all-reduce"]


def test_a_module_in_a_folder_from_which_it_is_run(programs, monkeypatch, capsys):
    monkeypatch.chdir(programs / "sub")
    assert cli.main(["inspect", "step_of_user:build", "--mesh", "data=4"]) == 0


def test_a_file_with_the_name_of_a_module(programs, capsys):
    """json.py would be the standard library's, were it imported by its name."""
    pathlib.Path("json.py").write_text("def build():\n    return (lambda x: x), (1.0,)\n")
    assert cli.main(["inspect", "json.py:build"]) == 0
    assert json.loads("1") == 1
    assert "no collective in the program" in capsys.readouterr().out


def test_the_lock_of_a_file_is_that_of_its_module(programs, monkeypatch, capsys):
    where = ["--mesh", "data=4"]
    assert cli.main(["lock", "update", "sub/step_of_user.py:build", *where]) == 0
    assert os.listdir("__collectives__") == ["sub.step_of_user.build.lock.json"]
    assert cli.main(["lock", "check", f"{programs}/sub/step_of_user.py:build", *where]) == 0
    (programs / "elsewhere").mkdir()
    monkeypatch.chdir(programs / "elsewhere")
    capsys.readouterr()
    assert cli.main(["lock", "check", "../sub/step_of_user.py:build", *where]) == 2
    assert capsys.readouterr().err == (
        "txcore: error: ../sub/step_of_user.py is not below this folder, so its lock needs --file "
        "FILE (see txcore lock check --help)\n"
    )


BAD = {
    "build fails": ("fails_of_user:builds_badly", "fails_of_user:builds_badly failed: KeyError: "
                    "'no data\\nsecond line' (fails_of_user.py:8; --traceback shows all)"),
    "in a library": ("fails_of_user.py:calls_a_library", "(fails_of_user.py:16; --traceback"),
    "trace fails": ("fails_of_user:traces_badly", "function does not compile: AttributeError: "),
    "trace fails, line": ("fails_of_user:traces_badly", "(fails_of_user.py:21; --traceback"),
    "quits": ("fails_of_user:quits_while_traced", "does not compile: SystemExit: 0 (fails_of_user"
              ".py:27; --traceback shows all)"),
    "import fails": ("bad_import.py:f", "cannot import bad_import.py: AttributeError: module "
                     "'fails_of_user' has no attribute 'absent' (bad_import.py:4; --traceback"),
    "import of module fails": ("bad_import:f", "cannot import bad_import: AttributeError: module"),
    "syntax": ("bad_syntax.py:f", "cannot import bad_syntax.py: SyntaxError: invalid syntax "
               "(bad_syntax.py, line 2) (bad_syntax.py:2; --traceback shows all)"),
    "no module": ("absent_module:f", "ModuleNotFoundError: No module named 'absent_module' "
                  "(--traceback shows all)"),
    "no file": ("absent.py:f", "there is no file absent.py"),
    "no factory": ("fails_of_user.py:absent", "file fails_of_user.py has no absent"),
    "no factory given": ("fails_of_user.py", "needs MODULE:FACTORY or FILE.py:FACTORY, but got "
                         "'fails_of_user.py'"),
    "a path without .py": ("sub/step_of_user:build", "needs MODULE:FACTORY or FILE.py:FACTORY"),
    "nothing after the colon": ("fails_of_user.py:", "needs MODULE:FACTORY or FILE.py:FACTORY"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_the_users_last_line_is_in_the_error(name, programs, capsys):
    factory, text = BAD[name]
    assert cli.main(["inspect", factory]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("txcore: error: ")
    assert text in err


@pytest.mark.parametrize("command", ["inspect", "lock check", "dump"])
def test_traceback_shows_all_of_it(command, programs, capsys):
    rest = ["out"] if command == "dump" else []
    given = [*command.split(), "fails_of_user:builds_badly", *rest, "--traceback"]
    assert cli.main(given) == 2
    *shown, line = capsys.readouterr().err.splitlines()
    assert shown[0] == "Traceback (most recent call last):"
    assert "KeyError: 'no data\\nsecond line'" in shown[-1]
    assert any('fails_of_user.py", line 12, in builds_badly' in row for row in shown)
    assert line.startswith("txcore: error: fails_of_user:builds_badly failed: KeyError: ")


EAGER = """
import jax
import jax.numpy as jnp

here = jnp.ones(8).sum()  # starts the backend
count = len(jax.devices())

def build(mesh):
    from jax.sharding import NamedSharding, PartitionSpec as P
    x = jax.ShapeDtypeStruct((count,), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    total = lambda x: jax.lax.psum(x, "data")
    return jax.shard_map(total, mesh=mesh, in_specs=P("data"), out_specs=P()), (x,)
"""


@pytest.mark.parametrize("where", [["--target", "cpu:6"], ["--devices", "6"]], ids=" ".join)
def test_devices_are_there_before_the_module_is_imported(where, tmp_path):
    (tmp_path / "eager.py").write_text(EAGER)
    done = subprocess.run(
        [sys.executable, "-m", "txcore", "inspect", "eager.py:build", "--mesh", "data=6", *where],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "1 collective" in done.stdout


def test_a_target_that_is_none_is_refused_before_the_module_is_imported(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "writes.py").write_text("open('imported', 'w')\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["inspect", "writes.py:f", "--target", "cuda:h1:8"]) == 2
    assert "--target: a target needs a known chip, got 'cuda:h1:8'" in capsys.readouterr().err
    assert not (tmp_path / "imported").exists()
