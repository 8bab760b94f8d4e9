"""The command line: exit codes, one line for bad input, and what it prints."""

import json
import pathlib
import subprocess
import sys
import textwrap

import pytest

from txcore import cli

HLO = """HloModule m, num_partitions=4
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %r = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add, \
metadata={op_name="jit(f)/PRIMITIVE"}
}
"""

FACTORIES = """
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

constant = 3

def sine():
    return jnp.sin, (jnp.ones(3),)

def arguments(mesh):
    return jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P("data")))

def explicit(mesh):
    total = lambda x: jax.lax.psum(x, "data")
    return jax.shard_map(total, mesh=mesh, in_specs=P("data"), out_specs=P()), (arguments(mesh),)

def twice(mesh):
    totals = lambda x: (jax.lax.psum(x, "data"), jax.lax.psum(x[:1], "data"))
    return jax.shard_map(totals, mesh=mesh, in_specs=P("data"), out_specs=P()), (arguments(mesh),)

def automatic(mesh):
    return lambda x: x.sum(0), (arguments(mesh),)

def fails():
    raise KeyError("no data\\nsecond line")

def quits():
    raise SystemExit("bye")

def nothing():
    return None

def no_args():
    return jnp.sin, jnp.ones(3)

def does_not_trace():
    return lambda x: x.nonsense, (jnp.ones(3),)
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "cli_factories.py").write_text(FACTORIES)
    (tmp_path / "cli_broken.py").write_text("raise ImportError('no such thing')\n")
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("cli_factories", None)


def write(tmp_path, primitive):
    path = tmp_path / "dump.txt"
    path.write_text(HLO.replace("PRIMITIVE", primitive))
    return str(path)


def test_a_clean_program_exits_0(factories, capsys):
    assert cli.main(["inspect", "cli_factories:sine"]) == 0
    assert capsys.readouterr().out == "proved: no collective in the program\n"


def test_an_explicit_program_on_a_mesh_exits_0(factories, capsys):
    assert cli.main(["inspect", "cli_factories:explicit", "--mesh", "data=2,model=2"]) == 0
    assert "proved: 1 collective, 64 B payload a call" in capsys.readouterr().out


def test_an_automatic_program_exits_1(factories, capsys):
    assert cli.main(["inspect", "cli_factories:automatic", "--mesh", "data=4", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [(row["kind"], row["origin"]) for row in report["collectives"]] == [
        ("all-reduce", "partitioner")
    ]


def test_a_target(factories, capsys):
    where = ["--target", "cpu:8", "--mesh", "data=4,model=2"]
    assert cli.main(["inspect", "cli_factories:explicit", *where, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["target"], report["mesh"]) == ("cpu:8", {"data": 4, "model": 2})
    assert cli.main(["inspect", "cli_factories:automatic", *where]) == 1


def test_after_partitioning(factories, capsys):
    arguments = ["inspect", "cli_factories:twice", "--mesh", "data=4", "--json"]
    rows = []
    for option in ([], ["--after-spmd"]):
        assert cli.main([*arguments, *option]) == 0
        rows.append(len(json.loads(capsys.readouterr().out)["collectives"]))
    assert rows == [1, 2]


def test_a_page_beside_the_table(factories, capsys):
    assert cli.main(["inspect", "cli_factories:sine", "--html", "page.html"]) == 0
    assert capsys.readouterr().out == "proved: no collective in the program\n"
    assert "no collective in the program" in pathlib.Path("page.html").read_text()


@pytest.mark.parametrize("primitive, code", [("psum", 0), ("dot_general", 1)])
def test_a_dump(tmp_path, capsys, primitive, code):
    arguments = ["inspect", "--hlo", write(tmp_path, primitive), "--mesh", "data=2,model=2"]
    assert cli.main(arguments) == code
    out = capsys.readouterr().out
    assert "all-reduce  model" in out
    assert ("not proved" in out) == (code == 0)


NEEDS_ONE = "needs either MODULE:FACTORY, --hlo FILE or -- COMMAND"
BAD = {
    "unknown command": (["prove"], "invalid choice: 'prove'"),
    "nothing to inspect": (["inspect", "--json"], NEEDS_ONE),
    "both": (["inspect", "a:b", "--hlo", "c"], NEEDS_ONE),
    "no colon": (["inspect", "cli_factories"], "needs MODULE:FACTORY or FILE.py:FACTORY, but "
                 "got 'cli_factories' (see txcore inspect --help)"),
    "no module": (["inspect", "cli_absent:f"], "ModuleNotFoundError: No module named 'cli_absent'"),
    "broken module": (["inspect", "cli_broken:f"],
                      "cannot import cli_broken: ImportError: no such thing"),
    "no factory": (["inspect", "cli_factories:gone"], "module cli_factories has no gone"),
    "no function": (["inspect", "cli_factories:constant"],
                    "needs to be a function that returns (fn, args), got "),
    "raises": (["inspect", "cli_factories:fails"], "cli_factories:fails failed: KeyError: "),
    "quits": (["inspect", "cli_factories:quits"], "cli_factories:quits failed: SystemExit: bye"),
    "returns nothing": (["inspect", "cli_factories:nothing"],
                        "needs to return (fn, args), args a tuple, got NoneType"),
    "returns no tuple of args": (["inspect", "cli_factories:no_args"],
                                 "needs to return (fn, args), args a tuple, got ("),
    "does not trace": (["inspect", "cli_factories:does_not_trace"],
                       "the function does not compile: AttributeError: "),
    "needs a mesh": (["inspect", "cli_factories:explicit"],
                     "does not take 0 arguments: give --mesh"),
    "takes no mesh": (["inspect", "cli_factories:sine", "--mesh", "data=2"],
                      "does not take 1 arguments: leave out --mesh"),
    "too few devices": (["inspect", "cli_factories:explicit", "--mesh", "data=16"],
                        "the mesh data=16 needs 16 devices, but there are 8: "
                        "give --devices 16 to simulate them on the CPU"),
    "too late for devices": (["inspect", "cli_factories:sine", "--devices", "4"],
                             "--devices 4: RuntimeError: "),
    "no devices": (["inspect", "cli_factories:sine", "--devices", "0"],
                   "needs a number of at least 1, but got '0'"),
    "no size": (["inspect", "cli_factories:sine", "--mesh", "data"],
                "needs axes with sizes, each once, as data=2,model=2, but got 'data'"),
    "size 0": (["inspect", "cli_factories:sine", "--mesh", "data=0"], "but got 'data=0'"),
    "an axis twice": (["inspect", "x:y", "--mesh", "a=2,a=2"], "but got 'a=2,a=2'"),
    "no file": (["inspect", "--hlo", "absent.txt"],
                "cannot read absent.txt: No such file or directory"),
    "a folder": (["inspect", "--hlo", "."], "cannot read .: Is a directory"),
    "no text": (["inspect", "--hlo", "binary"], "binary is not text"),
    "no HLO": (["inspect", "--hlo", "cli_factories.py"],
               "needs the text of an HLO module, which begins with 'HloModule'"),
    "too long": (["inspect", "--hlo", "cli_factories.py", "--max-bytes", "10"],
                 "cli_factories.py is longer than 10 bytes: raise --max-bytes"),
    "devices for a file": (["inspect", "--hlo", "binary", "--devices", "2"],
                           "--devices is for MODULE:FACTORY"),
    "a target for a file": (["inspect", "--hlo", "binary", "--target", "cpu:8"],
                            "--target is for MODULE:FACTORY"),
    "a stage of a file": (["inspect", "--hlo", "binary", "--after-spmd"],
                          "--after-spmd is for MODULE:FACTORY: a file holds one stage"),
    "a target and devices": (["inspect", "a:b", "--target", "cpu:8", "--devices", "8"],
                             "--devices: not allowed with argument --target"),
    "no such target": (["inspect", "cli_factories:sine", "--target", "cuda:h1:8"],
                       "--target: a target needs a known chip, got 'cuda:h1:8': use one of"),
    "a target with too few": (["inspect", "cli_factories:explicit", "--target", "cpu:9",
                               "--mesh", "data=9"], "needs 9 CPU devices, but this process has 8"),
    "a mesh beside the target": (["inspect", "cli_factories:explicit", "--target", "cpu:8",
                                  "--mesh", "data=4"], "--target: a mesh on cpu:8 needs axes"),
    "a target without a mesh": (["inspect", "cli_factories:explicit", "--target", "cpu:8"],
                                "does not take 0 arguments: give --mesh"),
    "not on the target": (["inspect", "cli_factories:sine", "--target", "cpu:8"],
                          "compiled for its devices, got one for cpu:1: give its"),
    "no folder for the page": (["inspect", "cli_factories:sine", "--html", "absent/page.html"],
                               "cannot write absent/page.html: "),
    "a bound without a file": (["inspect", "a:b", "--max-bytes", "3"],
                               "--max-bytes is for --hlo FILE and --against FILE"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exits_2(name, factories, capsys):
    pathlib.Path("binary").write_bytes(b"\xff\xfe\x00")
    arguments, message = BAD[name]
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("txcore: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_env_shows_versions_and_devices(capsys):
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    import jax

    assert f"jax                {jax.__version__}" in out
    assert "devices            8 x cpu" in out


def test_simulated_devices_in_a_process_of_its_own(factories):
    script = textwrap.dedent(
        """
        import sys
        from txcore.cli import main
        sys.exit(main(["inspect", "cli_factories:automatic", "--mesh", "data=3", "--devices", "3"]))
        """
    ).replace("(8, 4)", "(6, 4)")
    pathlib.Path("cli_factories.py").write_text(FACTORIES.replace("(8, 4)", "(6, 4)"))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "all-reduce  data  3" in done.stdout
    assert done.stderr == ""


def test_help_names_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "inspect" in out
    assert "env" in out


def test_what_changed_since_an_earlier_program(tmp_path, capsys):
    (tmp_path / "old").mkdir()
    before, after = write(tmp_path / "old", "psum"), write(tmp_path, "dot_general")
    page = tmp_path / "page.html"
    arguments = ["inspect", "--hlo", after, "--against", before, "--mesh", "data=2,model=2"]
    assert cli.main([*arguments, "--html", str(page)]) == 1
    out = capsys.readouterr().out
    changes, table = out.removeprefix("since the earlier program:\n").split("\n\n")
    assert table.splitlines()[0] == "failed"
    verdict, *why = table.splitlines()[4:]
    assert verdict.startswith("failed: 1 of 1 collective unexplained")
    assert why[0].startswith("why all-reduce over ")
    assert why[1].startswith("  write tx.psum(y, ")
    assert changes.count("all-reduce") == 2  # the one that came, and the one that went
    assert "partitioner" in page.read_text()


def test_changes_are_not_json(tmp_path, capsys):
    text = write(tmp_path, "psum")
    assert cli.main(["inspect", "--hlo", text, "--against", text, "--json"]) == 2
    assert "--against is for people" in capsys.readouterr().err
