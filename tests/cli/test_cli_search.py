"""`txcore costs --search`: its options; what it finds is in tests of the targets."""

import importlib.util

import pytest

from txcore.cli import main

INDIVISIBLE = """
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

def build(mesh):
    f = jax.shard_map(lambda x: 2 * x, mesh=mesh, in_specs=P(("data", "model")), out_specs=P())
    return f, (jax.ShapeDtypeStruct((3,), jnp.float32),)
"""


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--batch", "8"], "--batch, --remat and --seconds need --search AXES"),
        (["--search", "data"], "--search needs --target T"),
        (
            ["--search", "data", "--target", "cuda:h100:8", "--mesh", "data=8"],
            "--search tries all meshes of its axes, but got --mesh too",
        ),
        (["--search", "data", "--target", "cpu:8"], "a search needs a chip whose peaks are known"),
        (["--search", "data,data"], "needs different names as data,model"),
        (["--search", "data", "--batch", "0"], "needs counts from 1 on as 64,128"),
        (["--search", "data", "--seconds", "inf"], "needs a number of seconds above 0"),
    ],
)
def test_what_does_not_go_together(arguments, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        raise SystemExit(main(["costs", "nothing:build", *arguments]))
    assert exit_.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_factory_that_takes_no_batch(tmp_path, capsys):
    (tmp_path / "step.py").write_text("def build(mesh):\n    raise AssertionError\n")
    options = ["--search", "data", "--batch", "8", "--target", "cuda:h100:8"]
    assert main(["costs", f"{tmp_path}/step.py:build", *options]) == 2
    assert "needs to take (mesh, batch=) for this search" in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs the CUDA compiler"
)
def test_what_jax_refuses_of_every_mesh(tmp_path, capsys):
    (tmp_path / "step.py").write_text(INDIVISIBLE)
    options = ["--search", "data,model", "--target", "cuda:h100:2"]
    assert main(["costs", f"{tmp_path}/step.py:build", *options]) == 2
    said = capsys.readouterr().err
    assert said.count("compiling ") == 2
    assert "takes none of the meshes and batches: ValueError: " in said
    assert "step.py:" in said


def test_a_time_that_is_up_at_once(tmp_path, capsys):
    (tmp_path / "step.py").write_text("def build(mesh):\n    raise AssertionError\n")
    options = ["--search", "data", "--seconds", "1e-9", "--target", "tpu:v5e:2x2"]
    assert main(["costs", f"{tmp_path}/step.py:build", *options]) == 2
    assert "the time was up before a program was compiled" in capsys.readouterr().err
