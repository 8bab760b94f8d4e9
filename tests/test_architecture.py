"""The house: imports go down, every folder says what it imports, and the documents' paths exist."""

import ast
import re
from collections import Counter

import pytest
from import_graph import FOLDERS, ROOT, find_cycles, find_modules, read_graph, room_of

DOCUMENT = ROOT / "docs" / "architecture.md"
# What kernels and profiling may import of the rest: the ground floor.
GROUND = {"_compat", "bounded_json", "errors", "later", "outside", "step_events", "tags", "varying"}
OPS = [
    "bucket",
    "conv",
    "cross_entropy",
    "dense",
    "dropout",
    "linear_cross_entropy",
    "optimizer",
    "ring",
    "squared_norm",
]
MODULES = find_modules()
GRAPH = read_graph()
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def imported_by(room):
    """Return the modules of other folders that the modules of a folder import."""
    found = set()
    for name in MODULES:
        if room_of(name, PACKAGES) == room:
            found |= {other for other in GRAPH[name] if room_of(other, PACKAGES) != room}
    return found


def named_by(room):
    """Return what a folder's docstring says that it imports."""
    text = ast.get_docstring(ast.parse(MODULES[room].read_text())) or ""
    said = re.search(r"^Imports ([^.]*(?:\.[^.\s][^.]*)*)\.$", text, re.MULTILINE)
    assert said, f"{room} needs a line 'Imports `a`, `b`.' in its docstring, got {text!r}"
    names = re.findall(r"`([\w.]+)`", said[1])
    return {name if name == "txcore" else f"txcore.{name}" for name in names}


def test_no_modules_import_each_other():
    assert find_cycles(GRAPH) == []


@pytest.mark.parametrize("room", sorted(PACKAGES - {"txcore"}))
def test_a_folder_imports_what_it_says(room):
    named, imported = named_by(room), imported_by(room)
    unsaid = {other for other in imported if not {other, room_of(other, PACKAGES)} & named}
    assert unsaid == set(), f"{room} says that it imports {sorted(named)}"
    used = {name for other in imported for name in (other, room_of(other, PACKAGES))}
    assert named - used == set(), f"{room} names what it does not import"


@pytest.mark.parametrize("folder", ["kernels", "profiling"])
def test_kernels_and_profiling_know_nothing_of_training(folder):
    mine = f"txcore.{folder}."
    ground = {f"txcore.{name}" for name in GROUND}
    for name, others in GRAPH.items():
        if f"{name}.".startswith(mine):
            strangers = {other for other in others if not f"{other}.".startswith(mine)}
            assert strangers <= ground, name


def test_a_cycle_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert find_cycles(graph) == [("b", "c")]


def test_each_room_is_small():
    held = Counter(room_of(name, PACKAGES) for name in MODULES)
    assert {room: number - 1 for room, number in held.items() if number > 18} == {}


def paths_in(text):
    for path in re.findall(r"`([\w/.-]+/[\w/.-]*)`|\]\(\.\./([^)#]+)", text):
        yield next(filter(None, path))


def test_the_documents_paths_exist():
    table = DOCUMENT.read_text().partition("## Where to change what")[2]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 10
    for row in rows:
        found = list(paths_in(row))
        assert found, row
        assert [path for path in found if not (ROOT / path).exists()] == []


def test_links_lead_to_files():
    linked = re.findall(r"\]\(\.\./([^)#]+)", DOCUMENT.read_text())
    assert len(linked) > 30
    assert [path for path in linked if not (ROOT / path).exists()] == []


def test_every_room_is_in_the_house():
    text = DOCUMENT.read_text().partition("## A gradient")[0]
    for folder in FOLDERS:
        rooms = [path.parent.name for path in (ROOT / folder).glob("*/__init__.py")]
        assert [room for room in rooms if f"{room}/" not in text and room not in OPS] == []
