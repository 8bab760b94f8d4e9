"""Scan HLO text in one pass: brackets, quotes, commas and comments, whatever the text holds.

Every function looks at each character a few times at most, so the time stays linear even in text
made to be slow. A quoted string without an end extends to the end of the text.
"""

import re

QUOTED = r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)'
# Lists of numbers, "{0,1}," before another "{", match as one token: they can be most of a text.
_NUMBERS = r"(?:\{[\d\s,]*+\}\s*+,\s*+(?=\{))++"
_BRACKETS_AND_COMMAS = re.compile(rf"{_NUMBERS}|[()\[\]{{}},]|{QUOTED}", re.DOTALL)
_PARENTHESES = re.compile(rf"[()]|{QUOTED}", re.DOTALL)
_ANY_BRACKET = re.compile(r"[()\[\]{}]")
_QUOTED = re.compile(QUOTED, re.DOTALL)
_COMMENT = re.compile(r"/\*(?:[^*]|\*(?!/))*+(?:\*/|\Z)")  # XLA counts long lists: /*index=5*/
_KEY = re.compile(r"\s*([\w.\-]+)=")
_DEPTH = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


def find_closing(text: str, start: int) -> int | None:
    """Return the index after the ")" that closes the "(" at `start`, or None."""
    depth = 0
    for bracket in _PARENTHESES.finditer(text, start):
        depth += {"(": 1, ")": -1}.get(bracket[0], 0)
        if depth == 0:
            return bracket.end()
    return None


def split_outside(text: str, separator: str) -> list[str]:
    """Split a text at the separators that are outside of all brackets; drop empty parts."""
    if not _ANY_BRACKET.search(text):
        return [p.strip() for p in text.split(separator) if p.strip()]
    parts, depth, start = [], 0, 0
    for found in re.finditer(rf"[()\[\]{{}}]|{re.escape(separator)}", text):
        if found[0] != separator:
            depth += _DEPTH[found[0]]
        elif depth == 0:
            parts.append(text[start : found.start()].strip())
            start = found.end()
    return [p for p in [*parts, text[start:].strip()] if p]


def read_attributes(text: str) -> dict[str, str]:
    """Read `key=value, key=value`; commas in brackets and quotes are the values' own.

    Args:
      text: what follows an instruction's operands or a module's name, or is in braces.

    Returns:
      Each value as printed, by its key; the first one of a repeated key.

    Example:
      >>> read_attributes(', dimensions={0,1}, metadata={op_name="a, b"}, flag=true')
      {'dimensions': '{0,1}', 'metadata': '{op_name="a, b"}', 'flag': 'true'}
    """
    found: dict[str, str] = {}
    if not text:
        return found
    depth, start = 0, 0
    for token in _BRACKETS_AND_COMMAS.finditer(text):
        if token[0] == "," and depth == 0:
            _add_attribute(found, text[start : token.start()])
            start = token.end()
        else:
            depth = max(0, depth + _DEPTH.get(token[0], 0))
    _add_attribute(found, text[start:])
    return found


def _add_attribute(found: dict[str, str], part: str) -> None:
    if key := _KEY.match(part):
        found.setdefault(key[1], part[key.end() :].strip())


def strip_ends(value: str, ends: str = "{}") -> str:
    """Return what is between the braces, or other `ends`, of a value; the same without them."""
    return value[1:-1] if len(value) > 1 and value[0] + value[-1] == ends else value


def strip_quotes(value: str) -> str:
    """Return what is between the quotes of a value."""
    return strip_ends(value, '""')


def without_quoted(text: str) -> str:
    """Empty the quoted strings; leave a text with an odd number of quotes as it is."""
    return text if text.count('"') % 2 else _QUOTED.sub('""', text)


def without_comments(text: str) -> str:
    """Remove comments; one without an end stays."""
    return _COMMENT.sub(_unless_it_ends, text) if "/*" in text else text


def _unless_it_ends(comment: re.Match[str]) -> str:
    ends = len(comment[0]) >= 4 and comment[0].endswith("*/")
    return "" if ends else comment[0]
