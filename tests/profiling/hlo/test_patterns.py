"""Every regular expression that reads text from outside takes linear time, whatever the text.

Each is taken apart; before every part of it, what comes before is written as briefly as it can be,
and then each character that it knows is repeated. A pattern that backtracks takes minutes.
"""

import ast
import importlib
import pathlib
import re
import time

import pytest

import txcore.profiling

parser = re._parser  # type: ignore[attr-defined]
ROOT = pathlib.Path(txcore.profiling.__file__).parent
SIZES = (24, 500, 5_000)  # a power shows before it takes hours
SECONDS = 0.05  # of 5,000 characters: linear takes 0.5 ms, the square of it 0.07 to 0.4 s
CLASSES = {"category_digit": "7", "category_space": " ", "category_word": "a"}
FROM_ANYWHERE = {"search", "findall", "finditer", "sub", "split"}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(("txcore.profiling", *path.relative_to(ROOT).with_suffix("").parts))
        yield name.removesuffix(".__init__"), ast.parse(path.read_text())


def patterns():
    """Find what is compiled in a module, or written where it is used, and how it is used."""
    found, used = {}, {}
    for module, tree in modules():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            of, method = node.func.value, node.func.attr
            if isinstance(of, ast.Name):
                used.setdefault((module, of.id), set()).add(method)
            is_inline = isinstance(of, ast.Name) and of.id == "re" and node.args
            if is_inline and isinstance(node.args[0], ast.Constant) and method != "compile":
                found[f"{module}:{node.lineno}"] = re.compile(str(node.args[0].value)), {method}
        if "re.compile" in ast.unparse(tree):
            for name, value in vars(importlib.import_module(module)).items():
                if isinstance(value, re.Pattern) and isinstance(value.pattern, str):
                    found[f"{module}.{name}"] = value, used.get((module, name), {"search"})
    return found


PATTERNS = patterns()


def characters(item):
    """Return characters of each kind that a part of a pattern takes."""
    op, value = str(item[0]).lower(), item[1]
    if op == "literal":
        return [chr(value)]
    if op == "category":
        return [CLASSES.get(str(value).lower(), "!")]
    if op == "range":
        return [chr(value[0])]
    if op == "not_literal" or op == "any":
        return ["a", " "]
    if op == "in":
        if str(value[0][0]).lower() == "negate":
            refused = "".join(c for x in value[1:] for c in characters(x))
            known = re.compile(f"[{re.escape(refused)}]")
            return [c for c in 'a7 ,("\\{[:=' if not known.match(c)][:5]
        return [c for x in value for c in characters(x)]
    return []


def shortest(items):
    return "".join(map(shortest_of, items))


def shortest_of(item):
    op, value = str(item[0]).lower(), item[1]
    if op in ("max_repeat", "min_repeat", "possessive_repeat"):
        return shortest(value[2]) * value[0]
    if op == "subpattern":
        return shortest(value[-1])
    if op == "atomic_group":
        return shortest(value)
    if op == "branch":
        return min((shortest(branch) for branch in value[1]), key=len)
    return (characters(item) or [""])[0]


def inner(item):
    op, value = str(item[0]).lower(), item[1]
    if op in ("max_repeat", "min_repeat", "possessive_repeat"):
        return [value[2]]
    if op == "subpattern":
        return [value[-1]]
    if op == "atomic_group":
        return [value]
    return list(value[1]) if op == "branch" else []


def beginnings(items, before=""):
    """Yield what may stand before each part that is repeated, and once more after it."""
    for item in items:
        if "repeat" in str(item[0]).lower():
            yield before
        for part in inner(item):
            yield from beginnings(part, before)
            yield before + shortest(part)
        before += shortest_of(item)


def alphabet(items):
    for item in items:
        yield from characters(item)
        for part in inner(item):
            yield from alphabet(part)
            yield shortest(part)


def texts(pattern, size):
    tree = parser.parse(pattern.pattern, pattern.flags)
    units = {unit for unit in (*alphabet(tree), " ", "7") if unit}
    for before in sorted(set(beginnings(tree))):
        for unit in sorted(units):
            run = unit * (size // len(unit))
            yield from (before + run, before + run + "\0", run + "\0" + before)


def slowest(pattern, methods, size):
    """Return the longest time of one text, and the text's beginning."""
    search = pattern.search if methods & FROM_ANYWHERE else pattern.match
    most = 0.0, ""
    for text in texts(pattern, size):
        for apply in {search, pattern.fullmatch} if "fullmatch" in methods else {search}:
            start = time.process_time()
            apply(text)
            most = max(most, (time.process_time() - start, text[:60]))
            if most[0] > SECONDS:
                return most
    return most


def test_those_that_are_known_are_found():
    assert len(PATTERNS) > 40
    assert "txcore.profiling.hlo.read_groups._MESH" in PATTERNS


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_takes_linear_time(name):
    pattern, methods = PATTERNS[name]
    for size in SIZES:
        seconds, text = slowest(pattern, methods, size)
        assert seconds < SECONDS, (size, pattern.pattern, text)


# Those of the reader that were found so, and one that doubles with each character.
SLOW = (
    r"\bdim_labels=([\w?]+)_([\w?]+)->([\w?]+)",
    r"[a-z]\w*\[[^\[\]]*\](?:\{([^{}]*)\})?",
    r"f([468])(e\d+m\d+\w*)",
    r"(\w+\s*)*=",
)


@pytest.mark.parametrize("slow", SLOW)
def test_one_that_backtracks_is_found_out(slow):
    methods = {"search", "fullmatch"}
    worst = (slowest(re.compile(slow), methods, size)[0] for size in SIZES)
    assert any(seconds > SECONDS for seconds in worst)
