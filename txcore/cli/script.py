"""`txcore inspect -- COMMAND`: run a script unchanged, and report what it compiles."""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from txcore.cli import programs
from txcore.cli.errors import BadInput, BadUsage
from txcore.cli.output import complain, show

# jax imports this in every process that starts its backends: see profiling/gate/recording.py.
_PLUGIN = """import os, pathlib, traceback

def initialize():
    try:
        from txcore.profiling.gate.recording import record_programs
        record_programs({settings!r})
    except BaseException as error:
        file = pathlib.Path({folder!r}, f"{{os.getpid()}}.failed")
        file.write_text("".join(traceback.format_exception_only(error)))
"""
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_OTHERS = ("factory", "hlo", "against", "mesh", "devices", "target", "max_bytes")


def inspect_script(options: argparse.Namespace) -> int:
    """Run the command; return its exit code, or 1 where it is 0 and a program is not ok."""
    _check_options(options)
    argv = _make_command(options.program)
    if options.html is not None:
        _make_folder(options.html)
    with tempfile.TemporaryDirectory(prefix="txcore-inspect-") as folder:
        code = _run(argv, _environment(folder, options))
        run = programs.read_run(folder)
    if options.json:
        show(json.dumps(programs.to_dict(run, code), sort_keys=True, separators=(",", ":")))
    else:
        complain(programs.describe_run(run, code))
    return code or (0 if programs.is_ok(run) else 1)


def _check_options(options: argparse.Namespace) -> None:
    for name in _OTHERS:
        if getattr(options, name) is not None:
            given = "MODULE:FACTORY" if name == "factory" else f"--{name.replace('_', '-')}"
            raise BadUsage(f"{given} does not go with a command after --: leave it out")
    for name in ("after_spmd", "traceback"):
        if getattr(options, name):
            raise BadUsage(
                f"--{name.replace('_', '-')} is for MODULE:FACTORY: leave it out for a command"
            )


def _make_command(program: Sequence[str]) -> list[str]:
    """Return the command to run: a script or module with this interpreter, any other as it is."""
    if not program:
        raise BadUsage("inspect -- needs a command after it, as -- python train.py")
    first = program[0]
    if first == "-m":
        return [sys.executable, *program]
    if first.endswith(".py") and not os.access(first, os.X_OK):
        if not os.path.isfile(first):
            raise BadInput(f"inspect needs a script, but there is no file {first}")
        return [sys.executable, *program]
    if shutil.which(first) is None:
        raise BadInput(f"inspect needs SCRIPT.py or a command, but found no command {first}")
    return [*program]


def _make_folder(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make the folder {path}: {error.strerror or error}") from None


def _environment(folder: str, options: argparse.Namespace) -> dict[str, str]:
    """Return the command's environment: ours, and the plugin on the import path."""
    html = None if options.html is None else os.path.abspath(options.html)
    settings = {"folder": folder, "allow": options.allow, "first": options.first, "html": html}
    plugins = pathlib.Path(folder, "import", "jax_plugins")
    plugins.mkdir(parents=True)
    text = _PLUGIN.format(settings=settings, folder=folder)
    (plugins / "txcore_inspect.py").write_text(text, encoding="utf-8")
    # An empty entry would be the working folder, and so would a trailing separator be.
    path = [str(plugins.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def _run(argv: list[str], environment: dict[str, str]) -> int:
    """Run the command with our own input and output; return its exit code as a shell has it."""
    try:
        process = subprocess.Popen(argv, env=environment)
    except OSError as error:
        raise BadInput(f"cannot run {argv[0]}: {error.strerror or error}") from None
    with _passing_signals_on(process):
        code = process.wait()
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def _passing_signals_on(process: "subprocess.Popen[Any]") -> Iterator[None]:
    """Let the command alone answer signals; a terminal sends Ctrl-C to both."""

    def pass_on(number: int, _: Any) -> None:
        with contextlib.suppress(OSError):
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _FORWARDED}
    before |= {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT,)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
