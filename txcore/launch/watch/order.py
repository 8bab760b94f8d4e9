"""Compare the order of the events that need all ranks: steps, evaluations, barriers."""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from txcore.launch.watch.status import FAILED, RankEntry, Verdict
from txcore.launch.watch.verdict import rank_names

KEPT = 4096  # events that a rank keeps, to compare with older entries of other ranks
SAID = 6  # events in a rank's entry: it may have gone on since they differed


class Met(NamedTuple):
    """Hold one event of a rank.

    Attributes:
      number: counted from 1.
      digest: CRC-32 of all events up to it, in their order.
      event: its text.
    """

    number: int
    digest: int
    event: str


class Order:
    """Keep the events of one rank, and compare them with the other ranks' entries.

    Every rank has the same events in the same order, at its own pace. If the events with one number
    differ on two ranks, these wait for each other for ever, or exchange values of different
    programs. A slow rank never differs.

    The main thread adds events, the watch's thread reads them. Each operation reads or writes a
    single reference, so there is no lock.
    """

    def __init__(self) -> None:
        self.last = Met(0, 0, "the start")
        self._kept: list[Met | None] = [None] * KEPT
        self._kept[0] = self.last

    def add_event(self, event: str) -> None:
        """Add the next event."""
        number, digest, _ = self.last
        self.last = met = Met(number + 1, zlib.crc32(event.encode(), digest), event)
        self._kept[met.number % KEPT] = met

    def entry_fields(self) -> dict[str, Any]:
        """Return this rank's part of its entry in the table."""
        last = self.last
        first = max(0, last.number - SAID + 1)
        events = [met.event for n in range(first, last.number + 1) if (met := self._kept_event(n))]
        return {"count": last.number, "order": last.digest, "events": "\n".join(events)}

    def _kept_event(self, number: int) -> Met | None:
        met = self._kept[number % KEPT]
        return met if met is not None and met.number == number else None

    def judge(self, rank: int, table: Mapping[int, RankEntry]) -> Verdict | None:
        """Return a verdict if some rank has come to another event than this one."""
        for entry in (table[other] for other in sorted(table)):
            there = self._kept_event(entry.count)
            if there is not None and there.digest == entry.order:
                continue
            events = self._first_other(entry)
            if events is None and there is not None:
                events = there.event, there.event
            if events is not None:
                theirs = {r for r, e in table.items() if (e.count, e.order) == _place_of(entry)}
                ours = {r for r, e in table.items() if (e.count, e.order) == self.last[:2]}
                return _make_verdict((theirs, events[0]), ({rank, *ours}, events[1]))
        return None

    def _first_other(self, entry: RankEntry) -> tuple[str, str] | None:
        """Return the first event that differs from this rank's, and this rank's own."""
        events = entry.events.split("\n")
        first = entry.count - len(events) + 1
        for number, event in enumerate(events, first):
            own = self._kept_event(number)
            if own is not None and own.event != event:
                return event, own.event
        return None


def _place_of(entry: RankEntry) -> tuple[int, int]:
    return entry.count, entry.order


def _make_verdict(*groups: tuple[set[int], str]) -> Verdict:
    # The smaller group counts as different, so that every rank would write the same text.
    (few, event), (many, other) = sorted(groups, key=lambda g: (len(g[0]), -min(g[0])))
    what = f"{rank_names(few)} came to {event}, where {rank_names(many)} came to {other}"
    if event == other:
        what = f"{rank_names(few)} came to {event} by another way than {rank_names(many)}"
    return Verdict(
        f"{what}. Every rank has to make the same steps, evaluations, checkpoints and barriers in "
        "the same order, and to have as many batches in an epoch (tx.even_batches pads what is "
        "shorter): see what only one of them does",
        FAILED,
    )
