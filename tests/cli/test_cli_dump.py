"""`txcore dump`: which files it writes, what is in them, and which folders it refuses."""

import json
import pathlib
import sys

import pytest

from txcore import cli

FACTORIES = """
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import txcore as tx

def sine():
    return jnp.sin, (jnp.ones(3),)

def sums(mesh):
    def body(x):
        return tx.psum(x, "data", name="a"), tx.psum(x[:1], "data", name="b")

    x = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    return jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P()), (x,)
"""
STAGES = ["jaxpr.txt", "stablehlo.mlir", "after_spmd.hlo", "optimized.hlo"]
ALL = [*STAGES, "memory.json", "report.json"]


@pytest.fixture(autouse=True)
def factories(tmp_path, monkeypatch):
    (tmp_path / "dump_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("dump_factories", None)


def names(folder):
    return {path.name for path in pathlib.Path(folder).iterdir()}


@pytest.mark.parametrize("where", [[], ["--target", "cpu:4"]])
def test_every_stage_of_a_program(where, capsys):
    arguments = ["dump", "dump_factories:sums", "new/folder", "--mesh", "data=4", *where]
    assert cli.main(arguments) == 0
    folder = pathlib.Path("new/folder")
    assert names(folder) == set(ALL)
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{folder / name}: {(folder / name).stat().st_size} bytes" for name in ALL]
    jaxpr, stablehlo, partitioned, optimized = ((folder / name).read_text() for name in STAGES)
    assert jaxpr.count("psum_invariant") == 2
    assert stablehlo.count("stablehlo.all_reduce") == 2
    assert partitioned.count(" all-reduce(") == 2
    assert optimized.count(" all-reduce(") == 1, "XLA:CPU combines them"
    memory = json.loads((folder / "memory.json").read_text())
    assert memory["arguments"] == 2 * 4 * 4
    report = json.loads((folder / "report.json").read_text())
    assert (report["ok"], report["target"], report["mesh"]) == (True, "cpu:4", {"data": 4})


def test_a_second_dump_replaces_the_first():
    assert cli.main(["dump", "dump_factories:sums", "folder", "--mesh", "data=4"]) == 0
    assert cli.main(["dump", "dump_factories:sine", "folder"]) == 0
    # One device: nothing is partitioned, and the module of the earlier dump must not stay.
    assert names("folder") == set(ALL) - {"after_spmd.hlo"}
    assert "sin" in pathlib.Path("folder/jaxpr.txt").read_text()


def bad(arguments, capsys):
    assert cli.main(["dump", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def test_a_folder_with_other_files_is_refused_and_left_alone(capsys):
    before = names(".")
    text = bad(["dump_factories:sine", "."], capsys)
    assert "dump needs a new or empty DIR, or one of an earlier dump, but . holds " in text
    assert names(".") - {"__pycache__"} == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["dump_factories:sine", "dump_factories.py"], "cannot write dump_factories.py: Not a dir"),
        (["dump_factories:sine", "dump_factories.py/x"], "cannot write dump_factories.py/x: "),
        (["dump_factories:sums", "x"], "does not take 0 arguments: give --mesh"),
        (["dump_factories:sine"], "the following arguments are required: DIR"),
        (["dump_factories:sine", "x", "--target", "tpu"], "--target: a target needs to be as"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert message in bad(arguments, capsys)
    assert not pathlib.Path("x").exists()
