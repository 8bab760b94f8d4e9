"""Find the rank that failed first in a run of `txcore launch`, and say why."""

import dataclasses
import signal
from collections.abc import Sequence

from txcore.launch.launcher.hosts import Rank
from txcore.launch.watch.status import FAILED, TRY_AGAIN, how_ended, name_of, why_ended

# The exit codes of ranks that have lost another: by the watch, which ends all others too, or jax.
ENDED_BY_THE_WATCH = (TRY_AGAIN, FAILED)
LOST_A_PEER = (*ENDED_BY_THE_WATCH, -signal.SIGABRT, 128 + signal.SIGABRT)


@dataclasses.dataclass(frozen=True)
class Failure:
    """Describe how the first failed rank ended.

    Attributes:
      rank: which one.
      exit_code: 128 + n for signal n.
      text: in words.
      tail: the last lines of its stderr, if that is a file.
    """

    rank: int
    exit_code: int
    text: str
    tail: list[str]


def find_failure(
    ranks: Sequence[Rank], failed: Sequence[Rank], *, asked: int | None, given_up: str
) -> Failure | None:
    """Return how the rank ended that failed first; None where none failed.

    Args:
      ranks: all of the run.
      failed: those that failed, in the order in which that was seen.
      asked: the signal from outside that ended the run, if one did.
      given_up: why the launcher itself ended the last ranks; "" if it did not.
    """
    first = _choose_first(failed)
    if first is None:
        return None
    code = first.code or 0
    text = f"{first} {how_ended(code)}"
    if asked:
        text = f"after {name_of(asked)} from outside {text}"
    elif given_up:
        text = f"{given_up}: {text}"
    elif _is_a_cause(first):
        well = [rank for rank in ranks if rank.code == 0 and rank.ended < first.ended]
        if early := [str(rank.task.rank) for rank in well]:
            text += f"; rank {', '.join(early)} had ended with exit code 0 before"
    elif why := find_reason([first, *ranks]):
        text = f"{why}; so {text}"
    exit_code = code if code > 0 else 128 - code
    return Failure(first.task.rank, exit_code, text, first.last_lines())


def find_reason(ranks: Sequence[Rank]) -> str | None:
    """Return why all had to end: the first reason among what these ranks have written."""
    found = (why_ended(line) for rank in ranks for line in rank.own_words())
    return next((why for why in found if why is not None), None)


def _choose_first(failed: Sequence[Rank]) -> Rank | None:
    """Return the rank that failed by itself, or one that lost another, or one that we ended."""
    unasked = [rank for rank in failed if not rank.ended_by_us()]
    causes = [rank for rank in unasked if rank.code not in LOST_A_PEER]
    watched = [rank for rank in unasked if rank.code in ENDED_BY_THE_WATCH]  # they wrote a reason
    return next(iter([*causes, *watched, *unasked, *failed]), None)


def _is_a_cause(rank: Rank) -> bool:
    """Tell whether a rank failed by itself, not by us, by another rank or by a signal."""
    stopped = {128 + signal.SIGTERM, 128 + signal.SIGINT}
    if rank.task.host:  # a remote shell returns either form
        stopped |= {-signal.SIGTERM, -signal.SIGINT}
    return not rank.ended_by_us() and rank.code not in {*LOST_A_PEER, *stopped}
