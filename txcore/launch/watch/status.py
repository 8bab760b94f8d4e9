"""What the ranks of a run tell each other: one entry each, and at the end one verdict."""

import json
import re
import signal
from dataclasses import asdict, dataclass, fields
from enum import StrEnum

from txcore.errors import TxcoreError

FOLDER = "txcore/watch/"  # the entries' keys: this and the rank
VERDICT = FOLDER + "verdict"
TRY_AGAIN = 75  # EX_TEMPFAIL of BSD's sysexits.h: another attempt may succeed
FAILED = 70  # EX_SOFTWARE: a rank failed by an error of its own, and will again

# How a rank says why it ends where that is not its own error (shutdown.say, fit's end by a signal).
_LAST_WORDS = re.compile(
    r"txcore: (?:rank \d+ ends at step \d+ \([\w ]+\): (.+)|(SIG\w+ on rank \d+: stopped .+))"
)


class Phase(StrEnum):
    """What a rank does; the text is what the others read."""

    START = "start"
    DATA = "data"
    COMPILE = "compile"
    STEP = "step"
    EVAL_STEP = "eval step"
    COMPARISON = "comparison"
    SAVE = "save"
    BETWEEN_STEPS = "between steps"
    AFTER_FIT = "after fit"

    @classmethod
    def _missing_(cls, value: object) -> "Phase":
        raise ValueError(
            f"watch.at needs phase= one of {', '.join(repr(p.value) for p in cls)}, got {value!r}: "
            "a phase that is none has no timeout"
        )


# A rank waits for the others there, and so they have to end in time.
TIMED = frozenset({Phase.STEP, Phase.EVAL_STEP, Phase.COMPARISON})


class MismatchError(TxcoreError, RuntimeError):
    """Ranks or devices differ in what has to be the same; every rank raises it alike."""

    every_rank = True


@dataclass(frozen=True)
class Entry:
    """What one rank tells: a counter that shows that it lives, and what it does."""

    beat: int = 0
    step: int = 0
    phase: str = Phase.START.value  # read from outside: maybe one of another version
    seconds: float = 0.0  # in this phase of this step
    stop: int | None = None  # the boundary before which it could stop, once asked to
    reason: str = ""  # why it was asked to
    failed: str = ""  # its own error
    lost: str = ""  # its error that speaks of a lost peer
    ended: bool = False
    count: int = 0  # of what all ranks have to come to (order.py)
    order: int = 0  # the digest of all of it
    events: str = "the start"  # the last few of it, a line each
    waits: float = 0.0  # seconds since then

    def to_json(self) -> str:
        """Return the entry as short text."""
        return json.dumps({k: v for k, v in asdict(self).items() if v != _DEFAULTS[k]})


_DEFAULTS = asdict(Entry())


def read_entry(text: str) -> Entry | None:
    """Read an entry, or return None where it is none (strangers may write too)."""
    try:
        values = json.loads(text)
        known = {f.name for f in fields(Entry)}
        if not isinstance(values, dict) or not values.keys() <= known:
            return None
        for name, value in values.items():
            _check(value, _DEFAULTS[name])
        return Entry(**values)
    except (TypeError, ValueError):
        return None


def _check(value: object, default: object) -> None:
    kinds = (
        (int, float) if isinstance(default, float) else (int if default is None else type(default),)
    )
    if type(value) not in kinds:
        raise TypeError


@dataclass(frozen=True)
class Verdict:
    """Why the run has to end, and the exit code that says so."""

    text: str
    code: int = TRY_AGAIN

    def to_json(self) -> str:
        """Return the verdict as text."""
        return json.dumps(asdict(self))


def read_verdict(text: str) -> Verdict | None:
    """Read a verdict, or return None where it is none."""
    try:
        values = json.loads(text)
        verdict = Verdict(**values)
        fits = isinstance(verdict.text, str) and verdict.code in (TRY_AGAIN, FAILED)
        return verdict if fits else None
    except (TypeError, ValueError):
        return None


def name_of(number: int) -> str:
    """Return a signal's name; real-time ones have none but their number."""
    named = {*map(int, signal.Signals)}
    return signal.Signals(number).name if number in named else f"signal {number}"


def how_ended(code: int) -> str:
    """Return in words how a process ended, by its exit code, -n by signal n.

    Example:
      >>> from txcore.launch.watch.status import how_ended
      >>> how_ended(-9), how_ended(3)
      ('was killed by SIGKILL', 'ended with exit code 3')
    """
    return f"was killed by {name_of(-code)}" if code < 0 else f"ended with exit code {code}"


def why_ended(line: str) -> str | None:
    """Return the reason in a line with which a rank says why it ends; None where it is none.

    Example:
      >>> from txcore.launch.watch.status import why_ended
      >>> why_ended("txcore: rank 0 ends at step 5 (step): rank 1 was killed by SIGKILL")
      'rank 1 was killed by SIGKILL'
    """
    found = _LAST_WORDS.fullmatch(line)
    return None if found is None else found[1] or found[2]
