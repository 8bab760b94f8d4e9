"""`txcore launch --lock`: every rank runs the locked program, or says what differs."""

import pytest
from launched_cases import launch, write_script

from txcore import cli

STEPS = """
import jax, numpy as np, txcore as tx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
tx.initialize()
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
whole = np.ones((8, 16), np.float32)
x = jax.make_array_from_callback(whole.shape, NamedSharding(mesh, P("data")), lambda i: whole[i])
factor = 3 if jax.process_index() == 1 and "differs" in sys.argv else 2
add = lambda x: tx.psum(x * factor, "data", name="total")
step = jax.jit(jax.shard_map(add, mesh=mesh, in_specs=P("data"), out_specs=P()))
with tx.attested():
    step(x)
print("ran")
"""
NEITHER = "held nothing on rank 0, 1: no engine trained there, and no program ran in tx.attested()"


def test_a_rank_that_differs_ends_the_run_and_says_how(tmp_path):
    script, lock = write_script(tmp_path, STEPS), tmp_path / "step.lock.json"
    done = launch("-n", 2, "--lock", lock, "--update-lock", script)
    assert done.returncode == 0, done.stderr
    done = launch("-n", 2, "--lock", lock, script, "differs")
    assert done.returncode == 1
    assert "[1] txcore.profiling.lock.attest.AttestationError: a run that is held to" in done.stderr
    assert "[1]   its optimized module computes something else" in done.stderr


def test_ranks_that_hold_nothing_to_it_fail(tmp_path):
    script, lock = write_script(tmp_path, "print(1)"), tmp_path / "step.lock.json"
    lock.write_text("{}")
    done = launch("-n", 2, "--lock", lock, script)
    assert done.returncode == 1
    assert NEITHER in done.stderr


@pytest.mark.parametrize(
    "args,error",
    [
        (["--lock", "none.json"], "--lock needs a lock file, but there is none at "),
        (["--update-lock"], "--update-lock needs the file to write: give --lock FILE too"),
    ],
)
def test_bad_options(args, error, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_script(tmp_path, "print(1)")
    assert cli.main(["launch", "-n", "1", *args, "script.py"]) == 2
    assert error in capsys.readouterr().err
