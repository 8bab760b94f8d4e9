"""`txcore bench`: tables, files, bad input, several groups, several processes."""

import csv
import dataclasses
import json
import re
import subprocess
import sys

import pytest
from machine import mesh
from processes import rank_environment

import txcore as tx
from txcore import bench, cli
from txcore.cli import bench as command
from txcore.cli import bench_options
from txcore.kernels.dispatch.tuning_file import read_entries
from txcore.parallel.gradients.algorithms import ALGORITHMS

QUICK = ["--warmup", "1", "--iterations", "2"]
ROW = re.compile(r" *(\d+) +(\d+) +(\w+) +[\d.]+ +[\d.]+ +\d+% +[\d.]+ +[\d.]+ +(\d+)")


def run(capsys, *arguments, code=0):
    assert cli.main(["bench", *arguments, *QUICK]) == code, capsys.readouterr().err
    return capsys.readouterr().out


def rows_of(text):
    return [match.groups() for match in map(ROW.fullmatch, text.splitlines()) if match]


def test_the_names_are_those_of_the_library():
    assert tuple(bench.OPERATIONS) == bench_options.NAMES


def test_a_table_as_nccl_tests_has_it(capsys):
    out = run(
        capsys, "psum", "--mesh", "data=2", "--min-size", "1K", "--max-size", "64K", "--factor", "8"
    )
    lines = out.splitlines()
    assert lines[0].startswith(f"# txcore {tx.__version__}, jax ")
    assert lines[1] == "# 1 process(es), mesh data=2, 1 calls to warm up, 2 timed"
    assert lines[2] == (
        "# psum over data: 1 group(s) of 2 devices, in place where it can be; bandwidths in GB/s"
    )
    heads = ["size", "count", "type", "time(us)", "min(us)", "spread", "algbw", "busbw", "wrong"]
    assert lines[3].split() == heads
    sizes = [(str(size), str(size // 4), "float32", "0") for size in (1024, 8192, 65536)]
    assert rows_of(out) == sizes
    assert len(lines) == 4 + len(sizes)


def test_every_collective_dtype_and_several_groups(capsys):
    out = run(
        capsys,
        *("all", "--mesh", "data=2,model=2", "--axis", "model", "--out-of-place"),
        *("--dtype", "bfloat16,float64", "--min-size", "800", "--max-size", "800"),
    )
    for name in bench.OPERATIONS:
        assert f"# {name} over model: 2 group(s) of 2 devices, out of place" in out
    assert [row[2] for row in rows_of(out)] == ["bfloat16", "float64"] * len(bench.OPERATIONS)
    assert {row[3] for row in rows_of(out)} == {"0"}
    import jax

    assert not jax.config.read("jax_enable_x64")


def test_all_devices_and_all_axes(capsys):
    assert "1 group(s) of 8 devices" in run(capsys, "--max-size", "4K")
    given = ["--mesh", "a=2,b=2,c=2", "--axis", "c,a", "--max-size", "4K"]
    assert "# psum over c,a: 2 group(s) of 4 devices" in run(capsys, *given)


def test_every_algorithm(capsys):
    given = ["--mesh", "node=2,device=2", "--axis", "node,device", "--algorithm", "all"]
    out = run(
        capsys, *given, "--dtype", "float32,bfloat16", "--min-size", "1000", "--max-size", "1000"
    )
    for name in ALGORITHMS:
        assert f"# pmean by {name} over node,device: 1 group(s) of 4 devices" in out
    assert [row[3] for row in rows_of(out)] == ["0"] * 2 * len(ALGORITHMS)
    alone = run(
        capsys, "ppermute", "pmean", "--mesh", "data=3", "--algorithm", "all", "--max-size", "4K"
    )
    titles = re.findall(r"^# (.*) over data: ", alone, re.MULTILINE)
    left_out = {"hierarchical", "recursive_doubling"}
    assert titles == ["ppermute", *(f"pmean by {n}" for n in ALGORITHMS if n not in left_out)]


def test_a_ring_of_tpus_is_simulated_on_cpu(capsys):
    given = ["--mesh", "data=2", "--algorithm", "remote_dma", "--dtype", "bfloat16"]
    out = run(capsys, *given, "--max-size", "4K")
    assert "# pmean by remote_dma over data: 1 group(s) of 2 devices" in out
    assert "# simulated TPUs: what is wrong counts, the times are the simulator's" in out
    assert rows_of(out) == [("4096", "2048", "bfloat16", "0")]


def test_where_a_ring_of_tpus_runs():
    assert bench.algorithms_for([4], "tpu")["remote_dma"] == ""
    for platform in ("cpu", "gpu"):
        lack = bench.algorithms_for([4], platform)["remote_dma"]
        assert lack.startswith("to be named: GPUs without a switch refuse it")
    lack = bench.algorithms_for([2, 4], "tpu")["remote_dma"]
    assert lack == "one axis, a ring, as --axis data"


def test_a_wrong_collective_fails(capsys, monkeypatch):
    wrong = dataclasses.replace(
        bench.OPERATIONS["psum"], run=lambda x, axes: tx.psum(x, axes).at[3].add(1)
    )
    monkeypatch.setitem(bench.OPERATIONS, "psum", wrong)
    out = run(capsys, "--mesh", "data=2", "--max-size", "4K", code=1)
    assert rows_of(out) == [("4096", "1024", "float32", "4")]
    assert out.endswith("failed: 4 wrong elements\n")


def test_files(capsys, tmp_path):
    files = {kind: tmp_path / f"psum.{kind}" for kind in ("json", "csv", "png")}
    options = ["--json", files["json"], "--csv", files["csv"], "--plot", files["png"]]
    out = run(
        capsys, "psum", "ppermute", "--mesh", "data=2", "--max-size", "16K", *map(str, options)
    )
    content = json.loads(files["json"].read_text())
    assert content["mesh"] == {"data": 2}
    assert (content["processes"], content["warmup"], content["iterations"]) == (1, 1, 2)
    assert content["in_place"] is True
    assert [(r["operation"], r["size_bytes"]) for r in content["rows"]] == [
        *(("psum", 4096), ("psum", 16384)),
        *(("ppermute", 4096), ("ppermute", 16384)),
    ]
    with files["csv"].open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows_of(out)) == 4
    for mine, theirs in zip(content["rows"], table, strict=True):
        assert {name: str(mine[name]) for name in theirs} == theirs
        assert mine["algorithm_bandwidth"] == mine["size_bytes"] / mine["seconds"]
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_the_fastest_algorithm_is_recorded(capsys, tmp_path, monkeypatch):
    file = tmp_path / "tuning.json"
    monkeypatch.setenv("TXCORE_TUNING", str(file))
    given = ["--mesh", "data=2", "--algorithm", "plain,ring", "--max-size", "16K", "--record"]
    out = run(capsys, *given)
    assert out.endswith(f"written to {file}\n")
    said = re.findall(r"^fastest at (\d+) bytes of float32: (plain|ring)$", out, re.MULTILINE)
    assert [size for size, _ in said] == ["4096", "16384"]
    assert len(read_entries(file)) == 2
    simulated = ["--mesh", "data=2", "--algorithm", "plain,remote_dma", "--record"]
    assert cli.main(["bench", *simulated]) == 2
    refusal = "--record needs measured times, and remote_dma is simulated on cpu: leave it out"
    assert refusal in capsys.readouterr().err
    file.write_text("[")
    assert cli.main(["bench", *given]) == 2
    assert f"the tuning file {file} needs JSON" in capsys.readouterr().err


BAD = {
    "nothing to record": (
        ["--record", "--algorithm", "ring,bf16_wire"],
        "--record compares exact algorithms: give --algorithm all, or two or more",
    ),
    "nowhere to record": (
        ["--record", "--algorithm", "all"],
        "--record needs a tuning file, but TXCORE_TUNING is empty: name a file by it",
    ),
    "no such collective": (["sum"], "bench needs collectives among psum, pmean, "),
    "no such dtype": (["--dtype", "float8"], "--dtype needs names among float32, bfloat16, "),
    "a dtype twice": (["--dtype", "int8,int8"], "--dtype: needs names, each once, as a,b, but got"),
    "no such algorithm": (
        ["--mesh", "data=2", "--algorithm", "tree"],
        "--algorithm needs names among plain, chunked, ",
    ),
    "an algorithm of two axes": (
        ["--mesh", "data=2", "--algorithm", "hierarchical"],
        "--algorithm hierarchical needs at least two axes, as --axis node,device, but got data=2",
    ),
    "a ring over two axes": (
        ["--mesh", "a=2,b=2", "--axis", "a,b", "--algorithm", "remote_dma"],
        "--algorithm remote_dma needs one axis, a ring, as --axis data, but got a=2,b=2 on cpu",
    ),
    "a ring of float64": (
        ["--mesh", "data=2", "--algorithm", "remote_dma", "--dtype", "float64"],
        "needs arrays of float32, bfloat16, int32 with algorithm='remote_dma', got float64",
    ),
    "an algorithm of a sum": (
        ["psum", "--algorithm", "ring"],
        "--algorithm is for pmean, the mean of gradients, but got psum: name pmean, or",
    ),
    "an algorithm of integers": (
        ["--algorithm", "ring", "--dtype", "int8"],
        "--algorithm averages floats, but got --dtype int8: leave one out",
    ),
    "a size of nothing": (["--min-size", "0"], "needs a size of at least 1 byte, as 4096, 4K"),
    "a size in words": (["--max-size", "4Q"], "as 4096, 4K, 256M or 1G, but got '4Q'"),
    "sizes that cross": (
        ["--min-size", "8K", "--max-size", "4K"],
        "--max-size needs at least --min-size, 8192 bytes, but got 4096",
    ),
    "a size that stays": (["--factor", "1"], "--factor: needs at least 2, but got 1"),
    "no iterations": (["--iterations", "0"], "needs a number of at least 1, but got '0'"),
    "no such axis": (
        ["--mesh", "data=2", "--axis", "model"],
        "--axis needs an axis of the mesh, data, got 'model'",
    ),
    "nobody to talk to": (
        ["--mesh", "data=1"],
        "bench needs at least 2 devices along data, but there is 1: give --devices 2 to simulate",
    ),
    "too large a mesh": (["--mesh", "data=64"], "give --devices 64 to simulate them on the CPU"),
    "devices too late": (["--devices", "2"], "--devices 2: RuntimeError: "),
    "too small a size": (
        ["all_to_all", "--mesh", "data=8", "--min-size", "16", "--max-size", "16"],
        "all_to_all needs a size of at least 32 bytes (float32 over 8 devices), got 16: raise",
    ),
    "no such folder": (
        ["--mesh", "data=2", "--max-size", "4K", "--csv", "file/a.csv"],
        "cannot write file/a.csv: ",
    ),
    "no such kind of picture": (
        ["--mesh", "data=2", "--max-size", "4K", "--plot", "a.xyz"],
        "cannot write a.xyz: ValueError: Format 'xyz' is not supported",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exits_2(name, tmp_path, monkeypatch, capsys):
    mesh(data=8)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    arguments, message = BAD[name]
    assert cli.main(["bench", *QUICK, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("txcore: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_plot_needs_matplotlib_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "--plot", "a.png"]) == 2
    assert capsys.readouterr() == (
        "",
        "txcore: error: --plot needs matplotlib: pip install 'txcore[examples]'\n",
    )


def test_sizes():
    parse = bench_options.parse_size
    assert [parse(text) for text in ("1", "4K", "4k", "2M", "1G", "8B", "8KB")] == [
        *(1, 4096, 4096, 2 << 20, 1 << 30, 8, 8192)
    ]


def launch(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "txcore", "launch", *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        env={k: v for k, v in rank_environment().items() if k != "JAX_NUM_CPU_DEVICES"},
    )


@pytest.mark.skipif(sys.platform != "linux", reason="tested on Linux")
def test_two_processes_of_two_devices_over_gloo(tmp_path):
    file = tmp_path / "all.json"
    done = launch(
        *("-n", "2", "--devices-per-process", "2", "-m", "txcore", "bench", "all", "--json", file),
        *("--mesh", "node=2,device=2", "--axis", "node", "--max-size", "16K", *QUICK),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum(" timed" in line for line in lines) == 1  # rank 0 alone
    assert (
        "[0] # psum over node: 2 group(s) of 2 devices, in place where it can be; " in done.stdout
    )
    content = json.loads(file.read_text())
    assert (content["processes"], len(content["rows"])) == (2, 2 * len(bench.OPERATIONS))
    for row in content["rows"]:
        assert row["wrong"] == 0
        assert len(set(row["rank_seconds"])) == 2
        assert row["seconds"] == pytest.approx(sum(row["rank_seconds"]) / 2)
        assert row["least_seconds"] == min(row["rank_seconds"])


@pytest.mark.skipif(sys.platform != "linux", reason="tested on Linux")
def test_a_mesh_of_some_devices_of_two_processes_is_refused():
    done = launch("-n", "2", "--devices-per-process", "2", "-m", "txcore", "bench", "--mesh", "a=2")
    assert done.returncode == 2
    text = "--mesh needs sizes whose product is 4, the devices of all 2 processes, but got 2"
    assert f"txcore: error: {text}" in done.stderr
