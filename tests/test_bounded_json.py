"""JSON from anywhere: what the schema has is read, all else is refused by name and place."""

import json
import time

import pytest

from txcore import bounded_json
from txcore.bounded_json import JsonError, check, loads

FITS = [
    (str, "a"), (bool, True), (None, None), (int, -3), (float, 1), (float, 0.5), (range(3), 0),
    ("max", "max"), (3, 3), (int | str | None, None), ([int], []), ([int], [1, 2]),
    ((int, str), [1, "a"]), ({str: int}, {"x": 1}), ({"a": int, "b?": str}, {"a": 1}),
    ({"a": int, "b?": str}, {"a": 1, "b": ""}), (frozenset({None, (str, int)}), None),
    (frozenset({None, (str, int)}), ["a", 1]), ([{"a": [range(2)]}], [{"a": [0, 1]}]),
]  # fmt: skip
NOT = [
    (str, 1, "text"), (bool, 1, "true or false"), (None, 0, "null"), (int, True, "a whole number"),
    (int, 1.0, "a whole number"), (float, "1", "a number"), (float, True, "a number"),
    (range(3), 3, "a whole number of 0 to 2"), (range(3), True, "a whole number of 0 to 2"),
    ("max", "min", "'max'"), (3, True, "3"), (1, True, "1"), (int | None, "x", "a whole number"),
    ([int], {}, "a list"), ((int, str), [1], "2 values"), ({str: int}, [], "an object"),
    (frozenset({None, (str, int)}), ["a", "b"], "a list of text, a whole number or null"),
]  # fmt: skip


@pytest.mark.parametrize("spec, value", FITS)
def test_what_the_schema_has_fits(spec, value):
    check(value, spec)
    found = loads(document(x=value), {"x": spec}, format="f", version=1)
    assert found["x"] == value


@pytest.mark.parametrize("spec, value, words", NOT)
def test_what_it_does_not_have_is_refused(spec, value, words):
    with pytest.raises(JsonError) as refused:
        loads(document(x=value), {"x": spec}, format="f", version=1)
    assert str(refused.value).startswith(f"needs {words}")
    assert " as x, got " in str(refused.value)


def document(**more):
    return json.dumps({"format": "f", "version": 1, **more}).encode()


def refusal(data, schema=None, **bounds):
    with pytest.raises(JsonError) as refused:
        loads(data, schema or {}, format="f", version=1, **bounds)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_place_is_named():
    schema = {"a": {str: [{"n": int}]}}
    data = document(a={"x\x1b[2J": [{"n": 1}, {"n": "\x1b[31m"}]})
    said = refusal(data, schema)
    assert said == r"needs a whole number as a['x\x1b[2J'][1]['n'], got '\x1b[31m'"
    assert refusal(document(a={"x": [{}]}), schema) == "needs 'n' in a['x'][0], got none"
    said = refusal(document(a={"x": [{"n": 1, "m": 2}]}), schema)
    assert said == "needs no name but n in a['x'][0], got 'm'"


def test_format_and_version():
    assert refusal(b"[]") == 'needs an object with "format": "f", got []'
    assert refusal(b"{}") == 'needs an object with "format": "f", got none of that name'
    assert refusal(b'{"format": ["f"]}') == 'needs an object with "format": "f", got a list of 1'
    assert refusal(b'{"format": "f"}') == "needs version 1 for this txcore, got None"
    assert refusal(b'{"format": "f", "version": 1.0}').endswith("got 1.0")


@pytest.mark.parametrize("quoted", [r'"[[[[[[[[[[\"[[[[[[[[[["', r'"\\"', '"é,,,"'])
def test_brackets_and_commas_in_text_are_none(quoted):
    data = f'{{"format": "f", "version": 1, "x": {quoted}}}'.encode()
    loads(data, {"x": str}, format="f", version=1, deepest=1, most_values=4)
    said = refusal(data, {"x": str}, most_values=3)
    assert said == "needs at most 3 commas and brackets, got 4"


def test_depth():
    data = document(x=[[[1]]])
    loads(data, {"x": [[[int]]]}, format="f", version=1, deepest=4)
    assert refusal(data, deepest=3) == "needs at most 3 levels of brackets, got more"


HOSTILE = {
    "a name twice": lambda n: "{" + '"a":1,' * (n // 6) + '"a":1}',
    "names twice": lambda n: "{" + ",".join(f'"{i}":1' for i in [*range(n // 20)] * 2) + "}",
    "objects": lambda n: "[" + "{}," * (n // 3) + "{}]",
    "numbers": lambda n: "[" + "1," * (n // 2) + "1]",
    "fractions": lambda n: "[0." + "1" * n + "]",
    "exponents": lambda n: "[1e" + "9" * n + "]",
    "blanks": lambda n: "[" + " " * n + "1",
    "quotes": lambda n: "[" + '"' * n,
    "escaped quotes": lambda n: '["' + '\\"' * (n // 2),
    "backslashes": lambda n: '["' + "\\" * n,
    "no brackets": lambda n: "é[" * (n // 3),
    "surrogates": lambda n: '["' + "\\ud800" * (n // 6) + '"]',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_hostile_takes_linear_time(kind):
    data = HOSTILE[kind](3_000_000).encode()
    start = time.process_time()
    said = refusal(data)
    assert time.process_time() - start < 5  # 0.05 to 0.5 s; the square takes minutes
    assert len(said) < 200


def test_the_bounds_are_those_that_are_said():
    assert (bounded_json.MOST_VALUES, bounded_json.DEEPEST) == (4_000_000, 16)
