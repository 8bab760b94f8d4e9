"""The command line compiles for absent machines, in a process that nobody prepared for it."""

import os
import re
import subprocess
import sys

import pytest
from target_cases import available

FACTORIES = """
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import txcore as tx

def x(mesh):
    return jax.ShapeDtypeStruct((512, 4), jnp.float32, sharding=NamedSharding(mesh, P("data")))

def explicit(mesh):
    body = lambda x: tx.psum(x.sum(0), "data", name="sum")
    return jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P()), (x(mesh),)

def automatic(mesh):
    return lambda x: x.sum(0), (x(mesh),)
"""


def inspect(tmp_path, *arguments):
    (tmp_path / "cli_targets.py").write_text(FACTORIES)
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    return subprocess.run(
        [sys.executable, "-m", "txcore", "inspect", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "target, mesh, devices",
    [("cpu:8", "data=8", 8), ("cuda:h100:64x8", "data=512", 512), ("tpu:v5e:2x4", "data=8", 8)],
)
def test_inspect(tmp_path, target, mesh, devices):
    where = ("--target", available(target), "--mesh", mesh)
    done = inspect(tmp_path, "cli_targets:explicit", *where)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"all-reduce +data +{devices} +f32 +16 B", done.stdout)
    assert done.stdout.endswith("all declared (1 txcore); nothing was added\n")
    # jax up to 0.11 writes of the GPU plugin wherever it is imported beside it.
    lines = [x for x in done.stderr.splitlines() if "cudart_stub" not in x and "absl::I" not in x]
    assert lines == []


def test_what_is_added_for_a_target_exits_1(tmp_path):
    where = ("--target", available("tpu:v5e:2x4"), "--mesh", "data=8")
    done = inspect(tmp_path, "cli_targets:automatic", *where)
    assert done.returncode == 1, done.stderr
    assert "failed: 1 of 1 collective unexplained" in done.stdout
