"""The modules of `txcore.train` import each other without a circle, lazily and for types too."""

import ast
import graphlib
from pathlib import Path

import txcore.train

ROOT = Path(txcore.train.__file__).parent
ROOM = "txcore.train"


def imported_modules(path):
    """Return the modules of the room that a file imports anywhere, by their dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_graph():
    """Return the room's modules, each with those that it imports; packages only gather names."""
    files = {
        ".".join([ROOM, *path.relative_to(ROOT).with_suffix("").parts]): path
        for path in ROOT.rglob("*.py")
        if path.name != "__init__.py"
    }
    return {name: set(imported_modules(path)) & set(files) for name, path in files.items()}


def test_no_circle():
    graph = import_graph()
    assert f"{ROOM}.steps" in graph[f"{ROOM}.fit"]
    order = list(graphlib.TopologicalSorter(graph).static_order())  # a CycleError names the circle
    assert order.index(f"{ROOM}.fit") < order.index(f"{ROOM}.engine")
