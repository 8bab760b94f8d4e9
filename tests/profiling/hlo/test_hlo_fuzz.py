"""Damaged modules: none crashes the reader or makes it hang, and none hides a collective.

The rule: each line is damaged at one place at most, or has two tokens swapped; then there are at
least as many ops, "unknown" ones among them, as before, less those of lines of which nothing was
left (deleted, or cut before the name). A collective may count more often: half of an async pair
that lost the other half, say. Custom calls are left out of the count: which ones communicate is
only in their own config.

`TXCORE_FUZZ=20000` runs that many instead of a few hundred.
"""

import os
import pathlib
import re
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from txcore.profiling.hlo import find_collectives

COUNT = int(os.environ.get("TXCORE_FUZZ", "300"))
FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "hlo"
SECONDS = 10  # a bound on one module of at most 35 kB, which takes some 5 ms undamaged
IS_COLLECTIVE = re.compile(
    r"^\s+(?:ROOT )?%?[\w.\-]+ = .*\b(?:all-reduce|all-gather|reduce-scatter|all-to-all"
    r"|collective-permute|collective-broadcast|send)(?:-start)?\("
)
MODULES = [path.read_text() for path in sorted(FIXTURES.glob("*/*.hlo"))]
CHARACTERS = st.sampled_from("(){}[]\"'=,%~ \\\n\r\t\0/:;#aR09é\u2028")


def delete_character(draw, line):
    at = draw(st.integers(0, len(line)))
    return line[:at] + line[at + 1 :]


def insert_character(draw, line):
    at = draw(st.integers(0, len(line)))
    return line[:at] + draw(CHARACTERS) + line[at:]


def replace_character(draw, line):
    at = draw(st.integers(0, len(line)))
    return line[:at] + draw(CHARACTERS) + line[at + 1 :]


def swap_neighbours(draw, line):
    at = draw(st.integers(0, max(0, len(line) - 2)))
    return line[:at] + line[at : at + 2][::-1] + line[at + 2 :]


def truncate(draw, line):
    return line[: draw(st.integers(0, len(line)))]


def delete_token(draw, line):
    tokens = line.split(" ")
    del tokens[draw(st.integers(0, len(tokens) - 1))]
    return " ".join(tokens)


def duplicate_token(draw, line):
    tokens = line.split(" ")
    at = draw(st.integers(0, len(tokens) - 1))
    return " ".join([*tokens[: at + 1], *tokens[at:]])


def swap_tokens(draw, line):
    tokens = line.split(" ")
    a, b = draw(st.tuples(*[st.integers(0, len(tokens) - 1)] * 2))
    tokens[a], tokens[b] = tokens[b], tokens[a]
    return " ".join(tokens)


def delete_line(draw, line):
    return ""


def duplicate_line(draw, line):
    return f"{line}\n{line}"


WITHIN_A_LINE = (
    *(delete_character, insert_character, replace_character, swap_neighbours, truncate),
    *(delete_token, duplicate_token, swap_tokens, delete_line, duplicate_line),
)


@dataclass(frozen=True)
class Damaged:
    """A module before and after, and of how many collectives nothing is left."""

    before: str = field(repr=False)
    after: str = field(repr=False)
    gone: int

    @property
    def changed(self):
        return sorted(set(self.after.splitlines()) - set(self.before.splitlines()))


@st.composite
def damaged_modules(draw):
    """Damage a few lines of a module, collectives' and others."""
    text = draw(st.sampled_from(MODULES))
    lines = text.splitlines()
    collective = [i for i, line in enumerate(lines) if IS_COLLECTIVE.match(line)]
    others = [i for i, line in enumerate(lines) if line.strip() and i not in collective]
    gone = 0
    whole = set(range(len(lines)))
    for among in draw(st.permutations([collective, others]))[: draw(st.integers(1, 2))]:
        for place in draw(st.sets(st.sampled_from(among), min_size=1, max_size=3)):
            damaged = draw(st.sampled_from(WITHIN_A_LINE))(draw, lines[place])
            gone += place in collective and not damaged.strip()
            lines[place] = damaged
            whole.discard(place)
    if draw(st.booleans()):
        a, b = draw(st.tuples(*[st.sampled_from(sorted(whole))] * 2))
        lines[a], lines[b] = lines[b], lines[a]
        whole -= {a, b}
    joinable = [i for i in whole if i + 1 in whole and lines[i].strip()]
    if joinable and draw(st.booleans()):
        at = draw(st.sampled_from(joinable))
        lines[at : at + 2] = [" ".join(lines[at : at + 2])]  # the newline between is gone
    return Damaged(text, "\n".join(lines), gone)


@settings(max_examples=COUNT, deadline=None, suppress_health_check=list(HealthCheck))
@given(damaged_modules())
def test_a_damaged_module_hides_no_collective(module):
    known = [op for op in find_collectives(module.before) if op.kind != "custom-call"]
    start = time.process_time()
    ops = find_collectives(module.after)
    assert time.process_time() - start < SECONDS
    found = [op for op in ops if op.kind != "custom-call"]
    assert len(found) >= len(known) - module.gone, module.changed
    assert all(op.problem for op in ops if op.kind == "unknown")


@settings(max_examples=COUNT // 3, deadline=None)
@given(st.text(alphabet=st.one_of(CHARACTERS, st.characters()), max_size=400))
def test_any_text_can_be_read(text):
    find_collectives(text)
    find_collectives(f"HloModule m\n\nENTRY %e (x: f32[2]) -> f32[2] {{\n  %r = {text}\n}}\n")


@pytest.mark.parametrize("character", list('(){}[]"\\=,%'))
def test_a_long_run_of_any_character_takes_linear_time(character):
    line = f"  %r = f32[8] all-reduce(%x), metadata={{op_name={character * 100_000}"
    start = time.process_time()
    (op,) = find_collectives(f"HloModule m\nENTRY %e {{\n{line}\n}}\n")
    assert op.kind == "unknown"
    assert time.process_time() - start < SECONDS
