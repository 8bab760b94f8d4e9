"""What the Markdown files say is true: code runs, outputs are real, commands and links exist.

docs_cases.py says how blocks are read and run.
"""

import contextlib
import doctest
import functools
import importlib
import io
import pkgutil
import re
import shlex
import subprocess
import sys
import tempfile

import cli
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train
from data import download
from docs_cases import (
    BLOCK,
    LANGUAGES,
    MARKDOWN,
    PAGES,
    ROOT,
    assert_shown,
    blocks,
    commands,
    environment,
    run,
    run_python,
    run_txcore,
)
from jax.sharding import PartitionSpec
from processes import finish, free_port

import txcore as tx

COMMANDS = commands("bash")
ON_TARGETS = commands("bash targets")
# What users do not make themselves: the examples of MeshSpec and create_state show them, or errors.
MADE_BY_OTHERS = {"CheckpointError", "DeviceGroup", "TrainState"}
MODULES = [
    m.name
    for m in pkgutil.walk_packages(tx.__path__, "txcore.")
    if not m.name.rpartition(".")[2].startswith("triton_")  # they need triton: `make test-triton`
]


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks(page):
    run_python(page, "python")


def train_arguments(line):
    """Return the arguments of a training command, cut down to two steps on the digits."""
    line = re.sub(r"--(?:steps|epochs|dataset|data-dir) \S+", "", line)
    line = re.sub(r"--warmup \S+", "--warmup 1", line)
    return [*shlex.split(line.partition("train.py")[2]), "--steps", "2", "--dataset", "digits"]


@functools.cache
def train_once(*arguments):
    """Return what a training prints, and its exit code: many lines are one, cut down so."""
    printed = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(printed),
    ):
        return printed, train.main([*arguments])


SCRIPT = "python examples/mnist/train.py"
TRAINING = [row for row in COMMANDS if row[1].startswith(SCRIPT) and "--process-id" not in row[1]]


@pytest.mark.parametrize("page,line,shown", TRAINING, ids=[r[1] for r in TRAINING])
def test_training_command(page, line, shown):
    assert line.startswith("python examples/mnist/train.py")
    printed, code = train_once(*train_arguments(line))
    assert code == 0
    assert_shown(shown, printed.getvalue())


MAKE = [row for row in COMMANDS if row[1].startswith("make ")]


@pytest.mark.parametrize("page,line,shown", MAKE, ids=[f"{r[0]}: {r[1]}" for r in MAKE])
def test_make_target(page, line, shown):
    done = run("make", "-n", *shlex.split(line)[1:])
    assert done.returncode == 0, done.stderr
    if not shown:
        return
    recipe = next(r for r in done.stdout.splitlines() if "examples/mnist/train.py" in r)
    out, code = train_once(*train_arguments(recipe))
    assert code == 0
    *table, verdict = shown[shown.index("kind ") :].splitlines()
    printed = out.getvalue()
    assert verdict == printed.splitlines()[-1]
    assert_shown("\n".join(table), printed)


def test_the_proof_is_shown_after_make_mnist():
    shown = next(shown for page, line, shown in MAKE if (page, line) == (PAGES[0], "make mnist"))
    assert "\nproved: " in shown


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_several_processes(page, tmp_path):
    lines = [line for p, line, _ in COMMANDS if p == page and "--process-id" in line]
    if not lines:
        return
    port = free_port()
    lines = [re.sub(r"(?<=--coordinator 127\.0\.0\.1:)\d+", str(port), line) for line in lines]
    script = ROOT / "examples/mnist/train.py"
    processes = [
        subprocess.Popen(
            [sys.executable, script, *train_arguments(line), "--model", "mlp"],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line in lines
    ]
    codes, outputs, _ = zip(*finish(*processes, deadline_s=300), strict=True)
    assert codes == (0,) * len(lines), outputs
    assert f"{len(lines)} process(es)" in outputs[0]
    assert "proved: " in outputs[0]


@pytest.mark.parametrize("page", sorted({row[0] for row in COMMANDS if row[1][:7] == "txcore "}))
def test_txcore_commands(page, tmp_path):
    run_txcore(page, "bash", tmp_path)


def test_minimal_example():
    done = run(sys.executable, "-W", "error", "examples/minimal_dp.py")
    assert done.returncode == 0, done.stderr
    shown = [s for _, line, s in COMMANDS if line == "python examples/minimal_dp.py"]
    assert "proved: 1 collective" in done.stdout
    assert_shown("\n".join(shown), done.stdout)


def test_download_command_takes_what_is_there(tmp_path, monkeypatch):
    (line,) = {line for _, line, _ in COMMANDS if "download.py" in line}
    folder = tmp_path / line.partition("--data-dir ")[2]
    folder.mkdir(parents=True)
    for name in download.FILES:
        (folder / f"{name}.gz").touch()
    script, *args = shlex.split(line)[1:]
    assert run(sys.executable, ROOT / script, *args, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("page,line", [row[:2] for row in (*COMMANDS, *ON_TARGETS)])
def test_every_command_is_of_a_checked_form(page, line):
    checked = ["make ", "txcore ", "python examples/mnist/train.py"]
    checked.append("python examples/mnist/experiments.py")  # tests/examples/test_experiments.py
    others = ("python examples/minimal_dp.py", ". .venv/bin/activate", ".ci/run")
    is_download = line.startswith("python examples/mnist/download.py --data-dir ")
    assert line.startswith(tuple(checked)) or line in others or is_download
    assert line.startswith("txcore ") or (page, line) not in [row[:2] for row in ON_TARGETS]


@pytest.mark.parametrize("page", MARKDOWN)
def test_every_output_belongs_to_something_that_runs(page):
    outputs = [text for text, _ in blocks(page, "text")]
    made = [shown for language in LANGUAGES for _, shown in blocks(page, language)]
    assert sorted(outputs) == sorted(filter(None, made))


@pytest.mark.parametrize("page", MARKDOWN)
def test_relative_links_exist(page):
    text = BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    relative = [link.partition("#")[0] for link in links if not re.match(r"\w+:|#", link)]
    absent = [link for link in relative if not ((ROOT / page).parent / link).exists()]
    assert not absent


def test_flags_in_the_mnist_readme_are_those_of_the_script(capsys):
    with pytest.raises(SystemExit):
        cli.parse(["--help"])
    there = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help", "--no-audit"}
    table = re.findall(r"^\| `(--[a-z-]+)", (ROOT / PAGES[1]).read_text(), re.MULTILINE)
    assert set(table) == there


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    names = {"jax": jax, "jnp": jnp, "np": np, "tx": tx, "P": PartitionSpec}
    assert not doctest.testmod(importlib.import_module(name), extraglobs=names).failed


def test_public_names_have_an_example():
    public = {n: x for n, x in vars(tx).items() if n[0] != "_" and callable(x)}
    bare = {name for name, x in public.items() if ">>>" not in (x.__doc__ or "")}
    assert bare == MADE_BY_OTHERS
