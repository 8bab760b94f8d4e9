"""`txcore dump`: a program at every stage of its compilation, in files."""

import argparse
import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING, Any

from txcore.cli.errors import BadInput
from txcore.cli.load import add_program, compile_factory, path
from txcore.cli.output import show

if TYPE_CHECKING:
    from txcore.profiling.program import Program

_FILES = (
    "jaxpr.txt",
    "stablehlo.mlir",
    "after_spmd.hlo",
    "optimized.hlo",
    "memory.json",
    "report.json",
)


def add(commands: Any) -> None:
    """Add the command to the parser's subparsers."""
    parser = commands.add_parser("dump", help="write a program's stages into a folder")
    add_program(parser)
    parser.add_argument(
        "folder",
        type=path,
        metavar="DIR",
        help="new, empty, or with files of an earlier dump: replaced",
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Write the files, and print their names and sizes; return 0."""
    folder = pathlib.Path(options.folder)
    _check(folder)
    texts = _texts(compile_factory(options, keep_partitioned=True))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            (folder / name).unlink(missing_ok=True)
        for name, text in texts.items():
            _write(folder / name, text)
            show(f"{folder / name}: {len(text.encode())} bytes")
    except OSError as error:
        raise BadInput(f"cannot write {folder}: {error.strerror or error}") from None
    return 0


def _write(file: pathlib.Path, text: str) -> None:
    """Write a file, or none: half of one would pass for the whole."""
    try:
        file.write_text(text, encoding="utf-8")
    except OSError:
        file.unlink(missing_ok=True)
        raise


def _check(folder: pathlib.Path) -> None:
    """Refuse a folder that holds anything else, before compiling for it."""
    try:
        others = {each.name for each in folder.iterdir()} - set(_FILES) if folder.exists() else ()
    except OSError as error:
        raise BadInput(f"cannot write {folder}: {error.strerror or error}") from None
    if others:
        raise BadInput(
            f"dump needs a new or empty DIR, or one of an earlier dump, but {folder} holds "
            f"{sorted(others)[0]}: name another"
        )


def _texts(program: "Program") -> dict[str, str]:
    """Return the files' texts; those that the program lacks are left out."""
    from txcore.profiling.audit import audit_program
    from txcore.profiling.cost.memory import memory_of

    memory = memory_of(program.compiled)
    texts = {
        "jaxpr.txt": f"{program.jaxpr}\n",
        "stablehlo.mlir": program.lowered.as_text(debug_info=True),
        "after_spmd.hlo": program.partitioned,
        "optimized.hlo": program.compiled.as_text() or "",
        "memory.json": json.dumps(dataclasses.asdict(memory), indent=2) + "\n" if memory else "",
        "report.json": audit_program(program).to_json() + "\n",
    }
    return {name: text for name, text in texts.items() if text}
