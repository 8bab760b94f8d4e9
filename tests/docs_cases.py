"""Read the Markdown files' blocks and run them: what test_docs.py and test_docs_target.py share.

A page's ```python blocks run in one namespace; those whose first line is "# center.py" are also
saved as that file, for the commands that read it. A ```text block after code or a command, with
at most one paragraph between, is its output: each of its lines must be among those that come
out; an error must be raised. Only alignment, predicted times and line numbers in examples/ may
differ. Blocks of "python targets" and "bash targets" need compilers for absent machines.
"""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = ["README.md", "examples/mnist/README.md"]
PAGES += sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").glob("**/*.md"))
MARKDOWN = [*PAGES, "CHANGELOG.md", "CONTRIBUTING.md"]
LANGUAGES = ("python", "bash", "python targets", "bash targets")
BLOCK = re.compile(r"^```([\w ]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
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


def blocks(page, *languages):
    """Return each block of a page in `languages`, and the output that is shown for it, or ""."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = list(BLOCK.finditer(text))
    pairs = []
    for block, follower in zip(found, [*found[1:], None], strict=False):
        shown = ""
        if follower is not None and follower[1] == "text":
            between = text[block.end() : follower.start()].strip()
            shown = "" if "\n\n" in between else follower[2]
        if block[1] in languages:
            pairs.append((block[2], shown))
    return pairs


def commands(language):
    """Return (page, command line, output) of all such blocks; the output is the last line's."""
    rows = []
    for page in MARKDOWN:
        for block, shown in blocks(page, language):
            lines = [line.split("  #")[0].strip() for line in block.splitlines()]
            lines = [line for line in lines if line]
            rows += [(page, line, shown if line == lines[-1] else "") for line in lines]
    return rows


def plain(text):
    """Return the lines without alignment, rules, seconds, and line numbers of the examples."""
    text = re.sub(r"(?<![\w.])[\d.]+ (?:s|ms|us|ns)\b", "TIME", text)
    text = re.sub(r"\b(train|minimal_dp)\.py:\d+", r"\1.py:N", text)
    lines = (" ".join(line.split()) for line in text.splitlines())
    return [line for line in lines if line.strip("-")]


def assert_shown(shown, printed):
    """Hold a page's output to what was printed."""
    there = plain(printed)
    absent = [line for line in plain(shown) if line not in there]
    assert not absent, f"not printed: {absent}\nbut:\n{printed}"


def environment():
    """Return this process's environment without what make and its own devices add to it."""
    drop = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "XLA_FLAGS")
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    own = {"JAX_PLATFORMS": "cpu", "PATH": path}
    return {k: v for k, v in os.environ.items() if k not in drop} | own


def run(*args, cwd=ROOT, **options):
    """Run a command and return what it printed."""
    return subprocess.run(
        args, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300, **options
    )


def run_python(page, *languages):
    """Run a page's code blocks and hold them to the outputs that it shows."""
    pairs = blocks(page, *languages)
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


def saved_files(page):
    """Return the text of each file that a page's blocks name; several blocks may be one file."""
    files = {}
    for code, _ in blocks(page, "python"):
        if name := SAVED_AS.match(code):
            files[name[1]] = files.get(name[1], "") + code
    return files


def _cut_down(line):
    """Return a txcore command's arguments; a training in it takes two steps on the digits."""
    words = shlex.split(line)[1:]
    if (script := "examples/mnist/train.py") in words:
        words[words.index(script)] = str(ROOT / script)
        words += ["--steps", "2", "--dataset", "digits", "--warmup", "1"]
    return words


def run_txcore(page, language, folder):
    """Run a page's txcore commands one after the other, beside the files that the page saves."""
    for name, code in saved_files(page).items():
        (folder / name).write_text(code)
    lines = [row[1:] for row in commands(language) if row[0] == page]
    for line, shown in (row for row in lines if row[0].startswith("txcore ")):
        done = run(sys.executable, "-m", "txcore", *_cut_down(line), cwd=folder)
        fails = re.search(r"^failed: |entries grew|over budget", shown, re.MULTILINE)
        assert done.returncode == (fails is not None), f"{line}\n{done.stdout}{done.stderr}"
        # A report on a command is on stderr: stdout is the command's own.
        assert_shown(shown, done.stdout + (done.stderr if " -- " in line else ""))
