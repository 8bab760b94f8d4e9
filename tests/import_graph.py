"""The import graph of txcore, read from the source; run as a script it prints its figures.

Lazy imports, and those for type checkers alone, count as all others do.
"""

import ast
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"txcore": "txcore", "kernels": "txcore.kernels", "profiling": "txcore.profiling"}
Graph = Mapping[str, frozenset[str]]


def find_modules(root: Path = ROOT) -> dict[str, Path]:
    """Return the file of each module by its dotted name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            if not any((root / folder / part).is_symlink() for part in parts[:1]):
                found[".".join((package, *parts))] = path
    return found


def read_imports(path: Path, modules: Iterable[str]) -> frozenset[str]:
    """Return the modules that a file imports, wherever in it the import stands."""
    known, found = set(modules), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in whole}
    return frozenset(found & known)


def read_graph(root: Path = ROOT) -> Graph:
    """Return for each module those that it imports."""
    modules = find_modules(root)
    return {name: read_imports(path, modules) - {name} for name, path in modules.items()}


def room_of(module: str, packages: Iterable[str]) -> str:
    """Return the package that a module lies in."""
    return module if module in packages else module.rpartition(".")[0]


def find_cycles(graph: Graph) -> list[tuple[str, ...]]:
    """Return the groups of modules that import each other, by Tarjan's algorithm."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in order:
                visit(other)
            if other in stack:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == order[name]:
            start = stack.index(name)
            group = tuple(sorted(stack[start:]))
            del stack[start:]
            if len(group) > 1:
                found.append(group)

    for name in sorted(graph):
        if name not in order:
            visit(name)
    return found


def count_floors(graph: Graph) -> int:
    """Return the number of modules on the longest way down; the graph has no cycle."""
    heights: dict[str, int] = {}

    def height(name: str) -> int:
        if name not in heights:
            heights[name] = 1 + max((height(other) for other in graph[name]), default=0)
        return heights[name]

    return max(height(name) for name in graph)


def main(root: Path = ROOT) -> None:
    """Print the figures of a tree."""
    graph, modules = read_graph(root), find_modules(root)
    packages = {name for name, path in modules.items() if path.name == "__init__.py"}
    rooms = {
        (room_of(name, packages), room_of(other, packages))
        for name, others in graph.items()
        for other in others
    }
    sizes = sorted(len(path.read_text().splitlines()) for path in modules.values())
    held = [sum(room_of(name, packages) == room for name in modules) - 1 for room in packages]
    cycles = find_cycles(graph)
    print(f"modules {len(modules)}, rooms {len(packages)}, most modules in a room {max(held)}")
    print(f"arrows between modules {sum(map(len, graph.values()))}")
    print(f"arrows between rooms {sum(a != b for a, b in rooms)}")
    print(f"cycles {len(cycles)}, of {sum(map(len, cycles))} modules")
    if not cycles:
        print(f"floors {count_floors(graph)}")
    print(f"lines of a file: median {sizes[len(sizes) // 2]}, most {sizes[-1]}")
    for cycle in cycles:
        print("  " + " ".join(cycle))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
