"""The order in which ranks come to what needs all of them: steps, evaluations, barriers."""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from txcore.launch.watch.status import FAILED, Entry, Verdict
from txcore.launch.watch.verdict import rank_names

KEPT = 4096  # the last events of a rank, for ranks whose entry in the table is older
SAID = 6  # the last events that a rank tells the others: it may have gone on since they differed


class Met(NamedTuple):
    """What one rank has come to."""

    number: int  # of the event, from 1
    digest: int  # CRC-32 of all events up to it, in their order
    event: str


class Order:
    """Keep what one rank has come to, for comparison with what the others say they have.

    Every rank comes to the same in the same order, sooner or later. So two ranks whose events of
    one number differ wait for each other for ever, or exchange values of different programs.
    However slow a rank is, it never differs.

    The main thread adds, the watch's thread reads; each reads and writes single references.
    """

    def __init__(self) -> None:
        self.last = Met(0, 0, "the start")
        self._kept: list[Met | None] = [None] * KEPT
        self._kept[0] = self.last

    def add(self, event: str) -> None:
        """Come to the next event."""
        number, digest, _ = self.last
        self.last = met = Met(number + 1, zlib.crc32(event.encode(), digest), event)
        self._kept[met.number % KEPT] = met

    def said(self) -> dict[str, Any]:
        """Return this rank's part of its entry in the table."""
        last = self.last
        first = max(0, last.number - SAID + 1)
        events = [met.event for n in range(first, last.number + 1) if (met := self._met(n))]
        return {"count": last.number, "order": last.digest, "events": "\n".join(events)}

    def _met(self, number: int) -> Met | None:
        met = self._kept[number % KEPT]
        return met if met is not None and met.number == number else None

    def judge(self, rank: int, table: Mapping[int, Entry]) -> Verdict | None:
        """Say which ranks came to something else than this one."""
        for entry in (table[other] for other in sorted(table)):
            there = self._met(entry.count)
            if there is not None and there.digest == entry.order:
                continue
            events = self._first_other(entry)
            if events is None and there is not None:
                events = there.event, there.event
            if events is not None:
                theirs = {r for r, e in table.items() if (e.count, e.order) == _place(entry)}
                ours = {r for r, e in table.items() if (e.count, e.order) == self.last[:2]}
                return _verdict((theirs, events[0]), ({rank, *ours}, events[1]))
        return None

    def _first_other(self, entry: Entry) -> tuple[str, str] | None:
        """Return the first of a rank's last events that is another one here, and this one's."""
        events = entry.events.split("\n")
        first = entry.count - len(events) + 1
        for number, event in enumerate(events, first):
            own = self._met(number)
            if own is not None and own.event != event:
                return event, own.event
        return None


def _place(entry: Entry) -> tuple[int, int]:
    return entry.count, entry.order


def _verdict(*groups: tuple[set[int], str]) -> Verdict:
    # The same text whichever rank is first to see it: the fewer differ from the others.
    (few, event), (many, other) = sorted(groups, key=lambda g: (len(g[0]), -min(g[0])))
    what = f"{rank_names(few)} came to {event}, where {rank_names(many)} came to {other}"
    if event == other:
        what = f"{rank_names(few)} came to {event} by another way than {rank_names(many)}"
    return Verdict(
        f"{what}. Every rank has to make the same steps, evaluations, checkpoints and barriers in "
        "the same order, and to have as many batches in an epoch: see what only one of them does",
        FAILED,
    )
