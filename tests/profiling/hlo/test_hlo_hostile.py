"""Text made to stop the reader: time and memory grow with its length, whatever it holds.

Always: each kind of `hostile_hlo.py` at a size at which work that grows with the square takes
minutes. With `TXCORE_FUZZ=20000` also at 1, 2 and 4 MB, each in a process of its own whose memory
is measured, and so many modules with grammar-aware mutations instead of a few.
"""

import os
import random
import re
import time

import hostile_hlo
import pytest
from processes import call_in_process
from test_hlo_fuzz import MODULES

from txcore.profiling import audit_text

COUNT = int(os.environ.get("TXCORE_FUZZ", "200"))
IS_LONG = "TXCORE_FUZZ" in os.environ
SECONDS, MEGABYTES = 10, 2000
SIZE = 200_000


def audited(text):
    """Audit a text, and return what is said and the seconds of this process's own time."""
    start = time.process_time()
    try:
        report = audit_text(text)
        said = f"{report}\n{report.to_json()}"
    except ValueError as error:
        said = f"ValueError: {error}"
    return said, time.process_time() - start


@pytest.mark.parametrize("kind", hostile_hlo.KINDS)
def test_hostile_text_is_read_in_time(kind):
    text = hostile_hlo.KINDS[kind](SIZE)
    said, seconds = audited(text)
    assert seconds < SECONDS  # 0.01 to 1.5 s
    assert len(said) < 100 * len(text) + 10_000


@pytest.mark.skipif(not IS_LONG, reason="minutes: TXCORE_FUZZ=20000 runs it")
@pytest.mark.parametrize("kind", hostile_hlo.KINDS)
def test_hostile_text_of_megabytes(kind):
    sizes = (1_000_000, 2_000_000, 4_000_000)
    found = [call_in_process(hostile_hlo.measure, kind, size) for size in sizes]
    assert all(found)
    for seconds, megabytes, _, _ in found:
        assert seconds < SECONDS
        assert megabytes < MEGABYTES
    assert found[2][0] < 8 * found[0][0] + 0.5  # linear is 4 times, the square 16 times


PIECE = re.compile(
    r'"(?:[^"\\]|\\.)*"|\{[^{}]*\}|\([^()]*\)|\[[^\[\]]*\]|\d+|[%\w.\-]+|[,=(){}\[\]<"\\]'
)


def repeated(rng, piece, _, size):
    return piece * (size // len(piece))


def nested(rng, piece, _, size):
    opening, closing = rng.choice(["()", "{}", "[]", '""', ('\\"', '\\"'), ("/*", "*/")])
    depth = size // 8
    return opening * depth + piece + closing * rng.choice([0, depth - 1, depth])


def listed(rng, piece, other, size):
    parts = [rng.choice([piece, other]) for _ in range(size // (len(piece) + len(other) + 4))]
    return rng.choice([",", ", ", "},{", " ", "=", "/"]).join(parts)


def numbered(rng, piece, _, size):
    digits = [str(rng.randrange(10 ** rng.choice([1, 3, 9, 18, 40]))) for _ in range(size // 25)]
    return rng.choice(["", ",", "},{", "x"]).join(digits)


def quoted(rng, piece, other, size):
    inner = rng.choice([piece, other, "metadata={op_name=", "replica_groups={{", '\\"'])
    return '"' + inner * (size // len(inner)) + rng.choice(['"', "", '\\"'])


def swapped(rng, piece, other, size):
    return other


GROW = (repeated, nested, listed, numbered, quoted, swapped)


def grown(rng, text, size):
    """Put something large in the place of a token or a bracketed piece, or repeat whole lines."""
    lines = text.splitlines()
    if rng.random() < 0.3:
        at = rng.randrange(len(lines))
        few = lines[at : at + rng.randint(1, 4)]
        few = few * min(size // (1 + sum(map(len, few))), 4000)
        if rng.random() < 0.5:  # each a name of its own
            few = [re.sub(r"%([\w.\-]+) =", rf"%\1.{i} =", line) for i, line in enumerate(few)]
        return "\n".join([*lines[:at], *few, *lines[at:]])
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        pieces = list(PIECE.finditer(lines[at]))
        if not pieces:
            continue
        piece, other = rng.choice(pieces), rng.choice(pieces)[0]
        new = rng.choice(GROW)(rng, piece[0], other, size // 3)
        lines[at] = lines[at][: piece.start()] + new + lines[at][piece.end() :]
    return "\n".join(lines)


def test_modules_with_large_pieces_are_read_in_time():
    rng = random.Random(COUNT)
    for number in range(COUNT):
        text = rng.choice(MODULES)
        for _ in range(rng.choice([1, 1, 2])):
            text = grown(rng, text, 60_000)
        said, seconds = audited(text)
        assert seconds < SECONDS, (number, seconds, len(text), said[:200])
