"""The messages between the ranks of a run: an entry each, and at the end one verdict."""

import json
import re
import signal
from dataclasses import asdict, dataclass, fields
from enum import StrEnum

from txcore.errors import TxcoreError

FOLDER = "txcore/watch/"  # the entries' keys: this and the rank
VERDICT = FOLDER + "verdict"
TRY_AGAIN = 75  # EX_TEMPFAIL of BSD's sysexits.h: another attempt may succeed
FAILED = 70  # EX_SOFTWARE: a rank failed by its own error, and would fail again

# How a rank writes why it ends if not by its own error (shutdown.write_verdict, fit's end by a
# signal).
_LAST_WORDS = re.compile(
    r"txcore: (?:rank \d+ ends at step \d+ \([\w ]+\): (.+)|(SIG\w+ on rank \d+: stopped .+))"
)


class Phase(StrEnum):
    """Name what a rank is doing; the other ranks read the text."""

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
            "an unknown phase would have no timeout"
        )


# The phases in which a rank waits for the others, so they have to end in time.
TIMED = frozenset({Phase.STEP, Phase.EVAL_STEP, Phase.COMPARISON})


class MismatchError(TxcoreError, RuntimeError):
    """Ranks or devices differ in something that has to be equal; every rank raises it alike."""

    every_rank = True


@dataclass(frozen=True)
class RankEntry:
    """Hold the message of one rank to the others.

    Attributes:
      beat: a counter that shows that the rank lives.
      step: its current step.
      phase: its current phase; a rank with another version may send an unknown one.
      seconds: the time in this phase of this step.
      stop: the boundary before which it can stop; None until it is asked to.
      reason: why it was asked to stop.
      failed: its own error; "" without one.
      lost: its error about a lost peer; "" without one.
      ended: whether it has ended its program.
      count: the number of its events that need all ranks (order.py).
      order: the digest of all these events.
      events: the last few of them, a line each.
      waits: seconds since the last one.
    """

    beat: int = 0
    step: int = 0
    phase: str = Phase.START.value
    seconds: float = 0.0
    stop: int | None = None
    reason: str = ""
    failed: str = ""
    lost: str = ""
    ended: bool = False
    count: int = 0
    order: int = 0
    events: str = "the start"
    waits: float = 0.0

    def to_json(self) -> str:
        """Return the entry as short text."""
        return json.dumps({k: v for k, v in asdict(self).items() if v != _DEFAULTS[k]})


_DEFAULTS = asdict(RankEntry())


def read_entry(text: str) -> RankEntry | None:
    """Read an entry; return None for other text, which strangers may have written."""
    try:
        values = json.loads(text)
        known = {f.name for f in fields(RankEntry)}
        if not isinstance(values, dict) or not values.keys() <= known:
            return None
        for name, value in values.items():
            _check_type(value, _DEFAULTS[name])
        return RankEntry(**values)
    except (TypeError, ValueError):
        return None


def _check_type(value: object, default: object) -> None:
    kinds = (
        (int, float) if isinstance(default, float) else (int if default is None else type(default),)
    )
    if type(value) not in kinds:
        raise TypeError


@dataclass(frozen=True)
class Verdict:
    """Hold why the run has to end, and the exit code."""

    text: str
    code: int = TRY_AGAIN

    def to_json(self) -> str:
        """Return the verdict as text."""
        return json.dumps(asdict(self))


def read_verdict(text: str) -> Verdict | None:
    """Read a verdict; return None for other text."""
    try:
        values = json.loads(text)
        verdict = Verdict(**values)
        fits = isinstance(verdict.text, str) and verdict.code in (TRY_AGAIN, FAILED)
        return verdict if fits else None
    except (TypeError, ValueError):
        return None


def name_of(number: int) -> str:
    """Return a signal's name, or "signal 35" for a real-time one."""
    named = {*map(int, signal.Signals)}
    return signal.Signals(number).name if number in named else f"signal {number}"


def how_ended(code: int) -> str:
    """Describe how a process ended, from its exit code (-n for signal n).

    Example:
      >>> from txcore.launch.watch.status import how_ended
      >>> how_ended(-9), how_ended(3)
      ('was killed by SIGKILL', 'ended with exit code 3')
    """
    return f"was killed by {name_of(-code)}" if code < 0 else f"ended with exit code {code}"


def why_ended(line: str) -> str | None:
    """Return the reason in a rank's line about why it ends; None for another line.

    Example:
      >>> from txcore.launch.watch.status import why_ended
      >>> why_ended("txcore: rank 0 ends at step 5 (step): rank 1 was killed by SIGKILL")
      'rank 1 was killed by SIGKILL'
    """
    found = _LAST_WORDS.fullmatch(line)
    return None if found is None else found[1] or found[2]
