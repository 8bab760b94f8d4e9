"""`txcore inspect -- COMMAND`: the command is as it would be, and all that it compiles is seen."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from txcore import cli
from txcore.cli.programs import describe_run, is_ok, read_run, status_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
HEAD = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
jax.config.update("jax_num_cpu_devices", 4)
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
x = jax.device_put(np.ones((8, 16), np.float32), NamedSharding(mesh, P("data")))
add = lambda x: jax.lax.psum(x, "data")
total = jax.jit(jax.shard_map(add, mesh=mesh, in_specs=P("data"), out_specs=P()))
center = jax.jit(lambda x: x - x.mean(0))
"""
CENTER = f"train.py:{HEAD.count(chr(10))}"
TRAIN = f"""{HEAD}
import os, sys, signal
print(sys.argv[1:], __name__, os.path.basename(__file__), file=sys.stderr)
if __name__ == "__main__":
    total(x)
    if "auto" in sys.argv:
        center(x)
    print("trained", flush=True)
    if "killed" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(3 if "fails" in sys.argv else 0)
"""
FORKS = """
import os, runpy, sys
child = os.fork()
sys.argv = ["train.py"] + ([] if child else ["auto", "killed"])
try:
    runpy.run_path("train.py", run_name="__main__")
finally:
    if child:
        os.waitpid(child, 0)
"""
LOADS = f"""{HEAD}
from jax.experimental.serialize_executable import deserialize_and_load, serialize
made = serialize(center.lower(x).compile())
jax.config.update("jax_compilation_cache_dir", "cache")
deserialize_and_load(*made)(x)
jax.device_put(x, NamedSharding(mesh, P()))
jax.pmap(lambda x: jax.lax.psum(x, "i"), axis_name="i")(np.ones(4))
"""
TESTS = f"""{HEAD}
def test_total():
    total(x)
def test_center():
    center(x)
"""
RANKS = """
import sys, jax, numpy as np, txcore as tx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
tx.initialize()
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
whole = np.ones((8, 16), np.float32)
x = jax.make_array_from_callback(whole.shape, NamedSharding(mesh, P("data")), lambda i: whole[i])
add = lambda x: jax.lax.psum(x, "data")
total = jax.jit(jax.shard_map(add, mesh=mesh, in_specs=P("data"), out_specs=P()))
total(x)
if jax.process_index() == 1:
    jax.jit(lambda x: x.sum(), in_shardings=NamedSharding(mesh, P("data"))).lower(x).compile()
"""


@pytest.fixture
def scripts(tmp_path):
    named = {"train.py": TRAIN, "forks.py": FORKS, "loads.py": LOADS}
    for name, text in (named | {"test_steps.py": TESTS, "ranks.py": RANKS}).items():
        (tmp_path / name).write_text(text)
    return tmp_path


def inspect(folder, *args):
    """Run the command in a folder; return its exit code, and both of its outputs."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    drop = ("XLA_FLAGS", "PYTHONPATH")
    own = {name: value for name, value in os.environ.items() if name not in drop}
    done = subprocess.run(
        [sys.executable, "-m", "txcore", "inspect", *args],
        cwd=folder,
        env=own | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def programs(out):
    found = json.loads(out.splitlines()[-1])
    return found, [(p["called_at"], p["status"]) for p in found["programs"]]


def test_a_script_keeps_its_arguments_output_and_exit_code(scripts):
    code, out, err = inspect(scripts, "--html", "pages", "--", "train.py", "auto", "fails", "--x")
    assert code == 3
    assert out == "trained\n"
    assert err.startswith("['auto', 'fails', '--x'] __main__ train.py\n")
    assert "all-reduce over data at train.py" in err
    assert err.splitlines()[-1] == (
        "failed: 2 programs: 1 failed, 1 proved; 0 without a collective; the command's exit code "
        "is 3"
    )
    assert len(list((scripts / "pages").glob("*.html"))) == 2


def test_a_process_that_forks_and_one_that_is_killed(scripts):
    code, out, _ = inspect(scripts, "--json", "--", sys.executable, "forks.py")
    assert code == 1
    found, seen = programs(out)
    assert out.splitlines()[:-1] == ["trained", "trained"]
    assert found["processes"] == 2
    assert sorted(status for _, status in seen) == ["failed", "proved", "proved"]
    rows = [row for p in found["programs"] for row in p["report"]["collectives"]]
    assert {row["source"] for row in rows if not row["explained"]} == {CENTER}


def test_a_run_of_pytest_with_what_is_let_through(scripts):
    options = ("--allow", "partitioner", "--", sys.executable, "-m", "pytest", "-q")
    code, out, err = inspect(scripts, *options, "test_steps.py")
    assert code == 0, err
    assert "2 passed" in out
    assert err.splitlines()[-1] == (
        "not proved: 2 programs: 1 not proved, 1 proved; 0 without a collective"
    )
    assert "0 declared (none), 1 let through (1 partitioner); nothing else was added" in err


def test_the_first_program_is_enough(scripts):
    code, out, err = inspect(scripts, "--first", "1", "--", "-m", "train", "auto", "fails")
    assert (code, out) == (0, "")
    assert err.splitlines()[-1] == (
        "proved: 1 program: 1 proved; 0 without a collective; stopped after --first"
    )


def test_what_is_not_compiled_is_said(scripts):
    code, out, _ = inspect(scripts, "--json", "--allow", "partitioner", "--", "loads.py")
    found, seen = programs(out)
    assert code == 0
    assert found["status"] == "not proved"
    assert found["unseen"] == {"loaded": 1}
    assert [(m["source"], m["wire_bytes"]) for m in found["moves"]] == [("loads.py:15", 384)]
    assert ("loads.py:16", "proved") in seen  # pmap
    assert not list(scripts.glob("cache/*-cache"))


def test_ranks_are_seen_and_compared(scripts):
    launch = (sys.executable, "-m", "txcore", "launch", "-n", "2", "ranks.py")
    code, _, err = inspect(scripts, "--allow", "partitioner", "--", *launch)
    assert code == 1, err
    assert err.count("== jit(<lambda>)") == 2
    assert "rank 1 compiled jit(<lambda>), and rank 0 did not, or with other collectives" in err
    assert err.splitlines()[-1].startswith("failed: 3 programs in 2 processes: ")


def test_an_interpreter_that_keeps_txcore_out_proves_nothing(scripts):
    code, _, err = inspect(scripts, "--", sys.executable, "-I", "-c", "import jax; jax.devices()")
    assert code == 1
    assert err.startswith("failed: jax started in no process that could be seen (python -I, ")


def line(what, **fields):
    return json.dumps({"what": what, **fields}) + "\n"


def program(rank, digest="a", **fields):
    report = {"collectives": [{}]}
    one = {"name": "jit(step)", "called_at": "train.py:3", "processes": 2, "ranks": 2}
    one |= {"text": "proved: all", "status": "proved", "report": report, "digest": digest}
    return line("program", **one | {"rank": rank} | fields)


def test_a_rank_that_is_missing_or_cut_off(tmp_path):
    (tmp_path / "11.jsonl").write_text(line("began") + program(0) + '{"what": "prog')
    run = read_run(str(tmp_path))
    assert run.differing == ("rank 1 of 2 was not seen",)
    assert not is_ok(run)
    assert "1 written down only in part" in describe_run(run, 0)


def test_equal_ranks_are_shown_once(tmp_path):
    (tmp_path / "11.jsonl").write_text(line("began") + program(0) + program(0, "b"))
    (tmp_path / "12.jsonl").write_text(line("began") + program(1, "b") + program(1))
    run = read_run(str(tmp_path))
    assert (run.differing, status_of(run)) == ((), "proved")
    assert describe_run(run, 0).count("== jit(step)") == 2


def test_a_program_that_could_not_be_audited_fails(tmp_path):
    (tmp_path / "11.jsonl").write_text(line("failed", text="jit(f): KeyError: 1") + program(0))
    run = read_run(str(tmp_path))
    assert not is_ok(run)
    assert "not audited: jit(f): KeyError: 1" in describe_run(run, 0)


@pytest.mark.parametrize(
    "args,error",
    [
        (["--"], "needs a command after it, as -- python train.py"),
        (["--devices", "2", "--", "train.py"], "--devices does not go with a command after --"),
        (["m:f", "--", "train.py"], "MODULE:FACTORY does not go with a command after --"),
        (["--after-spmd", "--", "train.py"], "--after-spmd is for MODULE:FACTORY"),
        (["--", "nothing.py"], "there is no file nothing.py"),
        (["--", "no-such-command"], "found no command no-such-command"),
        (["--first", "1", "m:f"], "--first is for a command after --"),
        (["--allow", "user", "m:f"], "allow needs origins that are refused, of partitioner, "),
    ],
)
def test_what_does_not_go_together_is_refused(args, error, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["inspect", *args]) == 2
    assert error in capsys.readouterr().err


def test_sigterm_goes_to_the_command(scripts):
    waits = "import jax, time; jax.devices(); print(1, flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-m", "txcore", "inspect", "--", sys.executable, "-c", waits],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "1\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "compiled nothing: nothing is proved; the command's exit code is 143" in err
