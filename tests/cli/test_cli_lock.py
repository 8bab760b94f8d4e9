"""`txcore lock`: exit codes, what it prints and writes, and one line for bad input."""

import pathlib
import sys

import pytest

from txcore import cli

FACTORIES = """
import pathlib
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

def step(mesh):
    rows = int(pathlib.Path("rows").read_text())
    x = jax.ShapeDtypeStruct((rows, 4), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    total = lambda x: jax.lax.psum(x, "data")
    return jax.shard_map(total, mesh=mesh, in_specs=P("data"), out_specs=P()), (x,)

def automatic(mesh):
    fn, args = step(mesh)
    return lambda x: x.sum(0), args

def alone():
    return jnp.sin, (jnp.ones(3),)

def does_not_trace():
    return lambda x: x.nonsense, (jnp.ones(3),)
"""
FILE = pathlib.Path("__collectives__/lock_factories.step.lock.json")
STEP = ["lock_factories:step", "--mesh", "data=4,model=2"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "lock_factories.py").write_text(FACTORIES)
    (tmp_path / "rows").write_text("8")
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("lock_factories", None)


def lock(capsys, action, *arguments):
    """Return the exit code, and what went to stdout and stderr."""
    code = cli.main(["lock", action, *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_update_check_grow_and_shrink(capsys):
    code, out, _ = lock(capsys, "update", *STEP)
    assert code == 0
    assert out.splitlines() == [
        "+ lock_factories.py  all-reduce  data  float32  32 B  x1  user  lock_factories.py:10",
        f"{FILE}: 1 entry locked for cpu:8 data=4,model=2",
    ]
    written = FILE.read_text()
    assert lock(capsys, "check", *STEP, "--exact") == (
        0, "lock: 1 entry as locked for cpu:8 data=4,model=2\n", "",
    )  # fmt: skip

    pathlib.Path("rows").write_text("16")
    code, out, _ = lock(capsys, "check", *STEP)
    assert code == 1
    assert "  32 B -> 64 B  " in out
    assert "lock: 1 of 1 changed entries grew" in out

    pathlib.Path("rows").write_text("4")
    assert lock(capsys, "check", *STEP)[0] == 0
    assert lock(capsys, "check", *STEP, "--exact")[0] == 1
    assert FILE.read_text() == written
    assert lock(capsys, "update", *STEP)[0] == 0
    assert FILE.read_text() == written.replace('"payload_bytes": 32', '"payload_bytes": 16')


def test_another_target_is_another_section_of_the_file(capsys):
    half = ["lock_factories:step", "--target", "cpu:4", "--mesh", "data=4"]
    lock(capsys, "update", *STEP)
    code, _, err = lock(capsys, "check", *half)
    assert code == 2
    assert f"{FILE} needs a section 'cpu:4 data=4', but has cpu:8 data=4,model=2" in err
    assert lock(capsys, "update", *half)[0] == 0
    assert lock(capsys, "check", *half)[0] == 0
    assert lock(capsys, "check", *STEP)[0] == 0


def test_a_program_without_collectives(capsys):
    assert lock(capsys, "update", "lock_factories:alone", "--file", "alone.json")[0] == 0
    assert lock(capsys, "check", "lock_factories:alone", "--file", "alone.json")[0] == 0


def test_what_is_not_proved_is_neither_locked_nor_passed(capsys):
    mesh = ["--mesh", "data=8", "--file", "f.json"]
    code, out, _ = lock(capsys, "update", "lock_factories:automatic", *mesh)
    assert code == 1
    assert "failed: 1 of 1 collective unexplained" in out
    assert not pathlib.Path("f.json").exists()
    lock(capsys, "update", "lock_factories:step", *mesh)
    code, out, _ = lock(capsys, "check", "lock_factories:automatic", *mesh)
    assert code == 1
    assert "failed: 1 of 1 collective unexplained" in out


@pytest.mark.parametrize(
    "size, number",
    [
        ("48", 48),
        ("48B", 48),
        ("0.1 kB", 100),
        ("1.001 kB", 1001),
        ("2MB", 2_000_000),
        ("1KiB", 1024),
    ],
)
def test_budgets_are_written(capsys, size, number):
    assert lock(capsys, "update", *STEP, "--budget", f"data={size}", "--budget", "model=0")[0] == 0
    assert f'"budgets": {{"data": {number}, "model": 0}}' in FILE.read_text()
    assert lock(capsys, "update", *STEP, "--budget", "data=none")[0] == 0
    assert '"budgets": {"model": 0}' in FILE.read_text()


def test_over_budget_is_neither_locked_nor_passed(capsys):
    over = "over budget: each device sends {} B a call over data, at most 48 B are allowed"
    code, out, _ = lock(capsys, "update", *STEP, "--budget", "data=47")
    assert code == 1
    assert not FILE.exists()
    assert lock(capsys, "update", *STEP, "--budget", "data=48")[0] == 0  # 2(n-1)/n of 32 bytes
    pathlib.Path("rows").write_text("16")
    for action in ("check", "update"):
        code, out, _ = lock(capsys, action, *STEP)
        assert code == 1
        assert over.format(96) in out


BAD = {
    "no factory": (["check", "--exact"], "the following arguments are required: MODULE:FACTORY"),
    "no lock": (["check", *STEP], f"cannot read {FILE}: No such file or directory; txcore lock "
                "update writes what the program sends now"),
    "another target": (["check", "lock_factories:step", "--mesh", "data=2", "--file", "good"],
                       "good needs a section 'cpu:2 data=2', but has cpu:8 data=4,model=2"),
    "no JSON": (["check", *STEP, "--file", "rows2"], "rows2 needs JSON, got other text ("),
    "no lock file": (["update", *STEP, "--file", "rows"],
                     'rows needs an object with "format": "txcore-lock", got 8'),
    "a folder": (["update", *STEP, "--file", "."], "cannot read .: Is a directory"),
    "no folder": (["update", *STEP, "--file", "rows/x"], "cannot write rows/x: "),
    "no such axis": (["update", *STEP, "--budget", "pipe=1"],
                     "a budget needs an axis of the mesh, which has data, model, but got 'pipe'"),
    "an axis twice": (["update", *STEP, "--budget", "data=1", "--budget", "data=2"],
                      "--budget needs each axis once, but got one twice"),
    "no unit": (["update", *STEP, "--budget", "data=1XB"], "data=1.5GiB or data=none, but got"),
    "no size": (["update", *STEP, "--budget", "data"], "needs an axis and a size, as data=2MB"),
    "endless": (["update", *STEP, "--budget", f"data={'9' * 400}"], "needs an axis and a size"),
    "negative": (["update", *STEP, "--budget", "data=-1"], "but got 'data=-1'"),
    "a budget to check": (["check", *STEP, "--budget", "data=1"], "unrecognized arguments"),
    "no such target": (["check", *STEP, "--target", "tpu:v9:8"], "--target: "),
    "does not trace": (["check", "lock_factories:does_not_trace"],
                       "the function does not compile: AttributeError: "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exits_2(name, capsys):
    arguments, message = BAD[name]
    assert cli.main(["lock", "update", *STEP, "--file", "good"]) == 0
    pathlib.Path("rows2").write_text('{"format": "txcore-lock"')
    capsys.readouterr()
    code = cli.main(["lock", *arguments])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("txcore: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_what_nobody_asked_for_and_what_the_program_is_are_locked_on_request(capsys):
    args = ["lock_factories:automatic", "--target", "cpu:4", "--mesh", "data=4", "--file", "a.json"]
    assert cli.main(["lock", "update", *args]) == 1
    assert cli.main(["lock", "update", *args, "--allow", "partitioner", "--attest"]) == 0
    assert cli.main(["lock", "check", *args]) == 0
    text = pathlib.Path("a.json").read_text()
    assert '"allow": ["partitioner"]' in text
    assert '"proofs": [' in text
    assert cli.main(["lock", "update", *args, "--allow", "none"]) == 1
    assert cli.main(["lock", "update", *args, "--allow", "user"]) == 2
    assert "allow needs origins that are refused, of partitioner, " in capsys.readouterr().err
