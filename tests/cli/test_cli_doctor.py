"""`txcore doctor`: a machine as it is, a planted wrong collective, and one that hangs."""

import dataclasses
import json
import re
import subprocess
import sys

import jax.numpy as jnp
import pytest
from processes import rank_environment

from txcore import bench, cli, collectives, doctor
from txcore.cli.doctor import HUNG
from txcore.doctor import facts, limits

# In one process of 2 devices, or in 2 of one each: device 1 has one wrong element.
WRONG = """
import dataclasses, sys
import jax.numpy as jnp
from txcore import bench, cli, collectives

def sum_wrong(x, axes):
    return collectives.psum(x, axes).at[0].add(collectives.axis_index(axes).astype(x.dtype))

psum = dataclasses.replace(bench.OPERATIONS["psum"], run=sum_wrong)
kept = {"psum": psum, "pmax": bench.OPERATIONS["pmax"]}
bench.OPERATIONS.clear()
bench.OPERATIONS.update(kept)
sys.exit(cli.main(["doctor", *sys.argv[1:]]))
"""
HANGS = """
import dataclasses, sys, time
import jax
from txcore import bench, cli

def sum_never(x, axes):
    def wait(x):
        time.sleep(600)
        return x
    return jax.pure_callback(wait, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

bench.OPERATIONS["pmax"] = dataclasses.replace(bench.OPERATIONS["pmax"], run=sum_never)
sys.exit(cli.main(["doctor", *sys.argv[1:]]))
"""


def start(tmp_path, script, *arguments, ranks=1):
    file = tmp_path / "planted.py"
    file.write_text(script)
    launch = ["-m", "txcore", "launch", "-n", str(ranks)] if ranks > 1 else []
    environment = {k: v for k, v in rank_environment().items() if k != "JAX_NUM_CPU_DEVICES"}
    return subprocess.run(
        [sys.executable, *launch, str(file), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_a_machine_that_is_well(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("txcore.doctor.collectives.COUNTS", (257,))
    monkeypatch.setenv("NCCL_DEBUG", "INFO\n")
    assert cli.main(["doctor", "--json", str(tmp_path / "doctor.json")]) == 0
    out = capsys.readouterr().out
    for title in ("versions", "machine", "variables", "devices", "settings of jax", "limits"):
        assert f"\n{title}\n" in f"\n{out}"
    assert re.search(r"^  NCCL_DEBUG +INFO\\n$", out, re.MULTILINE)
    assert "  devices  8 x cpu" in out
    assert "collectives in groups of devices, 1 x 8, 4 x 2, 2 x 4, against NumPy" in out
    assert "  psum            right: float32, bfloat16, float16, int32, int8\n" in out
    assert "  pmean           right: float32, bfloat16, float16\n" in out
    assert out.endswith("well: 38 checks of collectives, all as NumPy has it\n")
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert ["devices", "8 x cpu"] in found["facts"]["devices"]
    assert {(one["wrong"], one["error"]) for one in found["collectives"]} == {(0, "")}


def add_one(run):
    return lambda x, axes: run(x, axes) + jnp.ones((), x.dtype)


@pytest.mark.parametrize("name", bench.OPERATIONS)
def test_every_collective_has_another_that_is_right(name, monkeypatch):
    monkeypatch.setattr("txcore.doctor.collectives.COUNTS", (257,))
    operation = bench.OPERATIONS[name]
    planted = dataclasses.replace(operation, run=add_one(operation.run))
    monkeypatch.setattr("txcore.doctor.collectives.OPERATIONS", {name: planted})
    setups = cli.doctor._make_setups()[1:]
    (found,) = doctor.check_collectives(setups, dtypes=["float32"])
    assert (found.operation, found.ok, found.ranks) == (name, False, (0,))
    assert found.instead


def test_one_that_cannot_run_and_nothing_else_is_right(monkeypatch, capsys):
    def fail(x, axes):
        raise NotImplementedError(f"no sums of {x.dtype}\non this backend")

    monkeypatch.setattr("txcore.doctor.collectives.COUNTS", (257,))
    for name, run in (("psum", fail), ("all_gather", fail)):
        planted = dataclasses.replace(bench.OPERATIONS[name], run=run)
        monkeypatch.setitem(bench.OPERATIONS, name, planted)
    monkeypatch.setattr(collectives, "all_gather", fail)
    for name in bench.OPERATIONS.keys() - {"psum", "all_gather"}:
        monkeypatch.delitem(bench.OPERATIONS, name)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    says = "NotImplementedError: no sums of float32; nothing else is right"
    assert f"  psum            FAILED: float32, {says}\n" in out
    assert "right instead: tx.psum of zeros with this device's part in its place" in out
    assert "failed: psum of float32, psum of bfloat16," in out


def test_a_wrong_collective_is_named_with_the_rank(tmp_path):
    done = start(tmp_path, WRONG, ranks=2)
    assert done.returncode == 1, done.stderr
    says = "FAILED: float32, 3 elements wrong on rank 1; right instead: tx.all_gather(x, axis), "
    assert done.stdout.count(says) == 1, done.stdout
    assert "failed: psum of float32" in done.stdout
    assert "pmax            right: float32, bfloat16, float16, int32, int8" in done.stdout


def test_a_collective_that_hangs_is_named(tmp_path):
    done = start(tmp_path, HANGS, "--devices", "2", "--limit", "10")
    assert done.returncode == HUNG, done.stderr
    assert "psum            right: float32" in done.stdout
    assert done.stderr.endswith(
        "txcore: pmax of 1 float32 over 2 devices has not returned for 10 s: this backend hangs "
        "there. Take one of those that are listed as right, or another backend "
        "(JAX_PLATFORMS=cpu); report it with the text above\n"
    )


def test_one_device_has_no_collectives(tmp_path):
    done = start(tmp_path, "from txcore import cli; cli.main(['doctor'])")
    assert "none: there is 1 device; --devices 2 simulates two on the CPU" in done.stdout


def test_secrets_are_not_shown():
    environment = {"TXCORE_TOKEN": "abc", "XLA_FLAGS": "--a", "HOME": "/home/me"}
    assert facts.list_variables(environment) == [
        ("TXCORE_TOKEN", "(not shown)"),
        ("XLA_FLAGS", "--a"),
    ]


def test_limits():
    assert not list(limits.check_files((1024, 1024)))
    assert not list(limits.check_files(None))
    assert [f.do for f in limits.check_files((512, 4096))] == ["ulimit -n 4096"]
    assert not list(limits.check_memory(8 << 30))
    assert "512 MiB of memory" in next(limits.check_memory(512 << 20)).what
    assert not list(limits.check_cores(8, "cpu", 8))
    assert not list(limits.check_cores(2, "gpu", 8))
    assert "64 MiB of shared memory" in next(limits.check_shared_memory(64 << 20)).what
    assert "no address" in next(limits.check_address(None)).what
    assert not list(limits.check_address("10.0.0.7"))
    assert "'unsafe_rbg'" in next(limits.check_generator("unsafe_rbg")).what
    assert not list(limits.check_generator("threefry2x32"))
