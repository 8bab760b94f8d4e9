"""Read JSON from outside, within bounds and by a schema.

Time and memory grow linearly with the text's length. Refused are more or deeper values than the
bounds allow, duplicate names, numbers of many digits, NaN, infinities, and whatever does not fit
the schema, which is made of:

    str, bool, None         a value of exactly this type (True is no int)
    int, float              any such number; a whole one is a float, too
    range(8)                an int in it
    "max", 3                this value
    int | str | None        one of these types
    [spec]                  a list of any length
    (spec, spec)            a list of exactly these
    {str: spec}             an object with any names
    {"a": spec, "b?": spec} an object with these names and no other; "b" may lack
    frozenset({spec, spec}) one of these
"""

import json
import math
import re
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any

from txcore.errors import TxcoreError
from txcore.outside import brief

MOST_VALUES = 4_000_000
DEEPEST = 16
_MOST_DIGITS = 18  # of an int; XLA and jax count in int64
_LONGEST_FLOAT = 40  # characters; Python writes at most 24
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NO_BRACKETS = {code: None for code in range(128) if chr(code) not in "[]{},"}
_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false", float: "a number"}
_NAMES |= {int: "a whole number", types.NoneType: "null"}

Path = tuple[str | int, ...]


class JsonError(TxcoreError, ValueError):
    """A text is not JSON of the schema; the message is one line, "needs A as PLACE, got B"."""


def loads(
    data: bytes,
    schema: Any,
    *,
    format: str,
    version: int,
    most_values: int = MOST_VALUES,
    deepest: int = DEEPEST,
) -> dict[str, Any]:
    """Return the object that is in `data`.

    Args:
      data: a file's bytes, UTF-8.
      schema: of the object, without its "format" and "version".
      format, version: what these two names must have.
      most_values: commas and brackets in the text, outside of strings.
      deepest: brackets that are open at once.

    Raises:
      JsonError: it is none.

    Example:
      >>> from txcore.bounded_json import loads
      >>> text = b'{"format": "x", "version": 1, "sizes": {"data": 8}}'
      >>> loads(text, {"sizes": {str: range(1, 99)}}, format="x", version=1)["sizes"]
      {'data': 8}
      >>> loads(text.replace(b"8", b"0"), {"sizes": {str: range(1, 99)}}, format="x", version=1)
      Traceback (most recent call last):
      txcore.bounded_json.JsonError: needs a whole number of 1 to 98 as sizes['data'], got 0
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise JsonError(f"needs text in UTF-8, got other bytes at {error.start}") from None
    _check_size(text, most_values, deepest)
    try:
        found = json.loads(
            text,
            object_pairs_hook=_each_once,
            parse_int=_parse_int,
            parse_float=_parse_float,
            parse_constant=_no_number,
        )
    except json.JSONDecodeError as error:
        raise JsonError(f"needs JSON, got other text ({error})") from None
    if type(found) is not dict or found.get("format") != format:
        raise JsonError(f'needs an object with "format": "{format}", got {_kind_of(found)}')
    given = found.get("version")
    if type(given) is not int or given != version:
        raise JsonError(f"needs version {version} for this txcore, got {brief(given)}")
    check(found, {"format": format, "version": version, **schema})
    return found


def _kind_of(found: Any) -> str:
    if type(found) is not dict:
        return brief(found)
    return brief(found["format"]) if "format" in found else "none of that name"


def _check_size(text: str, most_values: int, deepest: int) -> None:
    """Count values and depth before parsing: three bytes of text may take 64 bytes of memory."""
    outside = _STRING.sub("", text).translate(_NO_BRACKETS)
    if len(outside) > most_values:
        raise JsonError(f"needs at most {most_values} commas and brackets, got {len(outside)}")
    depth = 0
    for bracket in outside.replace(",", ""):
        depth += 1 if bracket in "[{" else -1
        if depth > deepest:
            raise JsonError(f"needs at most {deepest} levels of brackets, got more")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # json alone would keep the last one
        times = Counter(name for name, _ in pairs)
        twice = next(name for name in times if times[name] > 1)
        raise JsonError(f"needs each name once, got {brief(twice)} twice")
    return found


def _parse_int(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise JsonError(f"needs numbers of at most {_MOST_DIGITS} digits, got one of {len(digits)}")
    return int(digits)


def _parse_float(text: str) -> float:
    if len(text) > _LONGEST_FLOAT or not math.isfinite(number := float(text)):
        raise JsonError(f"needs finite numbers, got {brief(text, 40)[1:-1]}")
    return number


def _no_number(text: str) -> Any:
    raise JsonError(f"needs finite numbers, got {text}")


def check(value: Any, spec: Any, at: Path = ()) -> None:
    """Hold a value of JSON to a schema, as above.

    Raises:
      JsonError: it is none of it; says where.
    """
    if isinstance(spec, dict):
        _has_type(value, dict, at)
        for name, inner, of in _check_members(value, spec, at):
            check(inner, of, (*at, name))
    elif isinstance(spec, list | tuple):
        _has_type(value, list, at)
        if isinstance(spec, tuple) and len(spec) != len(value):
            raise JsonError(f"needs {len(spec)} values as {_describe_place(at)}, got {len(value)}")
        each = spec if isinstance(spec, tuple) else spec * len(value)
        for i, (inner, of) in enumerate(zip(value, each, strict=True)):
            check(inner, of, (*at, i))
    elif not _is_one(value, spec):
        raise JsonError(
            f"needs {_describe_spec(spec)} as {_describe_place(at)}, got {brief(value)}"
        )


def _has_type(value: Any, kind: type, at: Path) -> None:
    if type(value) is not kind:
        raise JsonError(f"needs {_NAMES[kind]} as {_describe_place(at)}, got {brief(value)}")


def _check_members(
    value: dict[str, Any], spec: dict[Any, Any], at: Path
) -> Iterator[tuple[str, Any, Any]]:
    if str in spec:
        return ((name, inner, spec[str]) for name, inner in value.items())
    known = {name.removesuffix("?"): of for name, of in spec.items()}
    if lacks := [name for name in spec if not name.endswith("?") and name not in value]:
        raise JsonError(f"needs {lacks[0]!r} in {_describe_place(at)}, got none")
    if unknown := [name for name in value if name not in known]:
        names = ", ".join(known)
        raise JsonError(
            f"needs no name but {names} in {_describe_place(at)}, got {brief(unknown[0])}"
        )
    return ((name, inner, known[name]) for name, inner in value.items())


def _is_one(value: Any, spec: Any) -> bool:
    if isinstance(spec, frozenset):
        return any(_is_one(value, each) for each in spec)
    if isinstance(spec, tuple):
        is_list = type(value) is list and len(value) == len(spec)
        return is_list and all(map(_is_one, value, spec))
    if isinstance(spec, types.UnionType):
        return any(_is_one(value, each) for each in spec.__args__)
    if isinstance(spec, range):
        return type(value) is int and value in spec
    if isinstance(spec, type):
        return type(value) is spec or (spec is float and type(value) is int)
    return type(value) is type(spec) and value == spec


def _describe_spec(spec: Any) -> str:
    if isinstance(spec, frozenset | types.UnionType):
        each = spec.__args__ if isinstance(spec, types.UnionType) else spec
        return " or ".join(sorted(map(_describe_spec, each)))
    if isinstance(spec, tuple):
        return f"a list of {', '.join(map(_describe_spec, spec))}"
    if isinstance(spec, range):
        return f"a whole number of {spec.start} to {spec.stop - 1}"
    return _NAMES.get(types.NoneType if spec is None else spec, repr(spec))


def _describe_place(at: Path) -> str:
    if not at:
        return "the file"
    first, *rest = at
    return f"{first}{''.join(f'[{brief(name)}]' for name in rest)}"
