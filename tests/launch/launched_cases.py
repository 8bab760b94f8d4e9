"""Run `txcore launch` as users do, but for importing jax, which takes a second.

python launched_cases.py ARGUMENTS_OF_TXCORE_LAUNCH...
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time
import types

ROOT = pathlib.Path(__file__).resolve().parents[2]
REPORT = pathlib.Path(__file__).with_name("launched_report.py")
DEADLINE_S = 60


def environment(**changes):
    """Return this process's environment, as a user's; a change to None takes a variable out."""
    drop = ("JAX_", "XLA_", "CUDA_", "PYTHONUNBUFFERED")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    changed = kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | changes
    return {k: v for k, v in changed.items() if v is not None}


def command(*args):
    return [sys.executable, __file__, *map(str, args)]


@contextlib.contextmanager
def start_launcher(*args, changes=None, **options):
    """Start the launcher, and kill it at the end of the context; what it started dies with it."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    process = subprocess.Popen(command(*args), env=environment(**changes or {}), **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in filter(None, (process.stdin, process.stdout, process.stderr)):
            pipe.close()


def launch(*args, changes=None, **options):
    """Run the launcher to its end."""
    options = {"capture_output": True, "text": True, "timeout": DEADLINE_S} | options
    return subprocess.run(command(*args), env=environment(**changes or {}), **options)


def write_script(folder, text, name="script.py"):
    """Write a script of Python."""
    path = folder / name
    path.write_text("import os, signal, sys, time\n" + textwrap.dedent(text))
    return path


def collect_reports(*args, **options):
    """Return what each rank says of itself, in the order of the ranks."""
    done = launch(*args, **options)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line[line.index("{") :]) for line in done.stdout.splitlines()]
    return sorted(found, key=lambda report: int(report["env"]["JAX_PROCESS_ID"]))


def wait_until(condition, what):
    """Wait until something is so, and return it."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError(f"{what} did not come")


def wait_for_pids(folder, count):
    """Wait for the files pid-RANK that scripts write; return the pids."""
    paths = [folder / f"pid-{rank}" for rank in range(count)]
    texts = wait_until(
        lambda: all(p.exists() and p.read_text().endswith("\n") for p in paths) and paths, "pids"
    )
    return [int(path.read_text()) for path in texts]


def is_running(pid):
    """Tell whether a process runs; one that nobody has waited for does not."""
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def wait_for_end(pids):
    wait_until(lambda: not any(map(is_running, pids)), f"the end of {pids}")


def main():
    """Run the command with packages whose own modules, which import jax, are left out."""
    for name in ("txcore", "txcore.launch", "txcore.launch.watch"):
        package = types.ModuleType(name)
        package.__path__ = [str(ROOT / name.replace(".", "/"))]
        sys.modules[name] = package
    from txcore.cli import main

    code = main(["launch", *sys.argv[1:]])
    heavy = {"jax", "jaxlib", "numpy"} & {*sys.modules}
    sys.exit(f"txcore launch has imported {heavy}" if heavy else code)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    main()
