"""What the Markdown files say is true: code runs, outputs are real, commands and links exist.

A page's ```python blocks run in one namespace; one whose first line is "# center.py" is also
saved under that name, for the commands that read it. A ```text block after code or a command, with
at most one paragraph between, is its output: each of its lines must be among those that come
out; an error must be raised. Only alignment and line numbers in examples/ may differ.
"""

import doctest
import importlib
import json
import os
import pathlib
import pkgutil
import re
import shlex
import socket
import subprocess
import sys

import download
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train
from jax.sharding import PartitionSpec

import txcore as tx

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = ["README.md", "examples/mnist/README.md"]
PAGES += sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").glob("**/*.md"))
MARKDOWN = [*PAGES, "CHANGELOG.md", "CONTRIBUTING.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SAVED_AS = re.compile(r"# (\w+\.py)\n")
# In a process of its own, where jax has not started yet; an error ends one block, not the page.
RUN_BLOCKS = """
import json, sys
namespace = {"__name__": "__main__"}
for name, code in json.load(sys.stdin):
    try:
        exec(compile(code, name, "exec"), namespace)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    print("=== end of block", flush=True)
"""
ERROR = re.compile(r"^\w+(?:Error|Exception|Warning): ", re.MULTILINE)
# What users do not make themselves: the examples of MeshSpec and create_state show them.
MADE_BY_OTHERS = {"ProcessGroup", "TrainState"}
MODULES = [m.name for m in pkgutil.walk_packages(tx.__path__, "txcore.")]


def blocks(page, language):
    """Return each block of a page in `language`, and the output that is shown for it, or ""."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = list(BLOCK.finditer(text))
    pairs = []
    for block, follower in zip(found, [*found[1:], None], strict=False):
        shown = ""
        if follower is not None and follower[1] == "text":
            between = text[block.end() : follower.start()].strip()
            shown = "" if "\n\n" in between else follower[2]
        if block[1] == language:
            pairs.append((block[2], shown))
    return pairs


def commands():
    """Return (page, command line, output) of all bash blocks; the output is the last line's."""
    rows = []
    for page in MARKDOWN:
        for block, shown in blocks(page, "bash"):
            lines = [line.split("  #")[0].strip() for line in block.splitlines()]
            lines = [line for line in lines if line]
            rows += [(page, line, shown if line == lines[-1] else "") for line in lines]
    return rows


COMMANDS = commands()


def plain(text):
    """Return the lines without alignment, rules, and line numbers of the examples' files."""
    text = re.sub(r"\b(train|minimal_dp)\.py:\d+", r"\1.py:N", text)
    lines = (" ".join(line.split()) for line in text.splitlines())
    return [line for line in lines if line.strip("-")]


def assert_shown(shown, printed):
    there = plain(printed)
    absent = [line for line in plain(shown) if line not in there]
    assert not absent, f"not printed: {absent}\nbut:\n{printed}"


def environment():
    """Return this process's environment without what make and its own devices add to it."""
    drop = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "XLA_FLAGS")
    return {k: v for k, v in os.environ.items() if k not in drop} | {"JAX_PLATFORMS": "cpu"}


def run(*args, cwd=ROOT, **options):
    return subprocess.run(
        args, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300, **options
    )


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks(page):
    pairs = blocks(page, "python")
    if not pairs:
        return
    named = [((SAVED_AS.match(code) or [0, page])[1], code) for code, _ in pairs]
    done = run(sys.executable, "-W", "error", "-c", RUN_BLOCKS, input=json.dumps(named))
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split("=== end of block\n")[:-1]
    for (code, shown), out in zip(pairs, printed, strict=True):
        assert bool(ERROR.search(out)) == bool(ERROR.match(shown)), f"{code}\nprinted\n{out}"
        # A long error is wrapped in the page.
        out = " ".join(out.split()) if ERROR.match(shown) else out
        assert_shown(" ".join(shown.split()) if ERROR.match(shown) else shown, out)


def train_arguments(line):
    """Return the arguments of a training command, cut down to two steps on the digits."""
    line = re.sub(r"--(?:steps|epochs|dataset|data-dir) \S+", "", line)
    return [*shlex.split(line.partition("train.py")[2]), "--steps", "2", "--dataset", "digits"]


TRAINING = [row for row in COMMANDS if "train.py" in row[1] and "--process-id" not in row[1]]


@pytest.mark.parametrize("page,line,shown", TRAINING, ids=[r[1] for r in TRAINING])
def test_training_command(page, line, shown, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert line.startswith("python examples/mnist/train.py")
    assert train.main(train_arguments(line)) == 0
    assert_shown(shown, capsys.readouterr().out)


MAKE = [row for row in COMMANDS if row[1].startswith("make ")]


@pytest.mark.parametrize("page,line,shown", MAKE, ids=[f"{r[0]}: {r[1]}" for r in MAKE])
def test_make_target(page, line, shown, tmp_path, monkeypatch, capsys):
    done = run("make", "-n", *shlex.split(line)[1:])
    assert done.returncode == 0, done.stderr
    if not shown:
        return
    recipe = next(r for r in done.stdout.splitlines() if "examples/mnist/train.py" in r)
    monkeypatch.chdir(tmp_path)
    assert train.main(train_arguments(recipe)) == 0
    *table, verdict = shown[shown.index("kind ") :].splitlines()
    printed = capsys.readouterr().out
    assert verdict == printed.splitlines()[-1]
    assert_shown("\n".join(table), printed)


def test_the_proof_is_shown_after_make_mnist():
    shown = next(shown for page, line, shown in MAKE if (page, line) == (PAGES[0], "make mnist"))
    assert "\nproof: " in shown


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_several_processes(page, tmp_path):
    lines = [line for p, line, _ in COMMANDS if p == page and "--process-id" in line]
    if not lines:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lines = [re.sub(r"(?<=--coordinator 127\.0\.0\.1:)\d+", str(port), line) for line in lines]
    script = ROOT / "examples/mnist/train.py"
    processes = [
        subprocess.Popen(
            [sys.executable, script, *train_arguments(line)],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line in lines
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(lines), outputs
    assert f"{len(lines)} process(es)" in outputs[0]
    assert "proof: " in outputs[0]


TXCORE = [row for row in COMMANDS if row[1].startswith("txcore ")]


@pytest.mark.parametrize("page,line,shown", TXCORE, ids=[row[1] for row in TXCORE])
def test_txcore_command(page, line, shown, tmp_path):
    for code, _ in blocks(page, "python"):
        if name := SAVED_AS.match(code):
            (tmp_path / name[1]).write_text(code)
    done = run(sys.executable, "-m", "txcore.cli", *shlex.split(line)[1:], cwd=tmp_path)
    assert done.returncode == ("proof FAILED" in shown), done.stderr
    assert_shown(shown, done.stdout)


def test_minimal_example():
    done = run(sys.executable, "-W", "error", "examples/minimal_dp.py")
    assert done.returncode == 0, done.stderr
    shown = [s for _, line, s in COMMANDS if line == "python examples/minimal_dp.py"]
    assert "proof: 1 collective" in done.stdout
    assert_shown("\n".join(shown), done.stdout)


def test_download_command_takes_what_is_there(tmp_path, monkeypatch):
    (line,) = {line for _, line, _ in COMMANDS if "download.py" in line}
    folder = tmp_path / line.partition("--data-dir ")[2]
    folder.mkdir(parents=True)
    for name in download.FILES:
        (folder / f"{name}.gz").touch()
    script, *args = shlex.split(line)[1:]
    assert run(sys.executable, ROOT / script, *args, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("page,line", [row[:2] for row in COMMANDS])
def test_every_command_is_of_a_checked_form(page, line):
    checked = ("make ", "txcore ", "python examples/mnist/train.py")
    others = ("python examples/minimal_dp.py", ". .venv/bin/activate", ".ci/run")
    is_download = line.startswith("python examples/mnist/download.py --data-dir ")
    assert line.startswith(checked) or line in others or is_download


@pytest.mark.parametrize("page", MARKDOWN)
def test_every_output_belongs_to_something_that_runs(page):
    outputs = [text for text, _ in blocks(page, "text")]
    made = [shown for language in ("python", "bash") for _, shown in blocks(page, language)]
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
        train.parse(["--help"])
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
