"""`txcore dump`: write a program's stages of compilation into files."""

import argparse
import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING, Any

from txcore.cli.errors import BadInput
from txcore.cli.load import add_program, compile_factory, parse_path
from txcore.cli.output import show, writing

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


def add_command(commands: Any) -> None:
    """Add the command to the parser's subparsers."""
    parser = commands.add_parser("dump", help="write a program's stages into a folder")
    add_program(parser)
    parser.add_argument(
        "folder",
        type=parse_path,
        metavar="DIR",
        help="new, empty, or with files of an earlier dump: replaced",
    )
    parser.set_defaults(command=dump_program)


def dump_program(options: argparse.Namespace) -> int:
    """Write the files, and print their names and sizes; return 0."""
    folder = pathlib.Path(options.folder)
    _check_folder(folder)
    texts = _make_texts(compile_factory(options, keep_partitioned=True))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            (folder / name).unlink(missing_ok=True)
        for name, text in texts.items():
            _write_whole(folder / name, text)
            show(f"{folder / name}: {len(text.encode())} bytes")
    return 0


def _write_whole(file: pathlib.Path, text: str) -> None:
    """Write a file completely or not at all: a partial one would look complete."""
    try:
        file.write_text(text, encoding="utf-8")
    except OSError:
        file.unlink(missing_ok=True)
        raise


def _check_folder(folder: pathlib.Path) -> None:
    """Refuse a folder that holds other files, before anything is compiled."""
    with writing(folder):
        others = {each.name for each in folder.iterdir()} - set(_FILES) if folder.exists() else ()
    if others:
        raise BadInput(
            f"dump needs a new or empty DIR, or one of an earlier dump, but {folder} holds "
            f"{sorted(others)[0]}: name another"
        )


def _make_texts(program: "Program") -> dict[str, str]:
    """Return the text of each file; stages that the program lacks are left out."""
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
