"""The order in which ranks come to what needs all of them: steps, evaluations, barriers."""

import zlib
from collections.abc import Mapping
from typing import NamedTuple

from txcore.launch.table import FAILED, Entry, Verdict
from txcore.launch.verdict import rank_names

KEPT = 4096  # the last events of a rank, for ranks whose entry in the table is older


class Met(NamedTuple):
    """What one rank has come to."""

    number: int  # of the event, from 1
    digest: int  # CRC-32 of all of them, in their order
    event: str


class Order:
    """Keep what one rank has come to, for comparison with what the others say they have.

    Every rank comes to the same in the same order, sooner or later. So two ranks that differ at
    the same count wait for each other for ever, or exchange values of different programs. However
    slow a rank is, it never differs.

    The main thread adds, the watch's thread reads; each reads and writes single references.
    """

    def __init__(self) -> None:
        self.last = Met(0, 0, "the start")
        self._kept: list[Met | None] = [None] * KEPT
        self._kept[0] = self.last

    def add(self, event: str) -> None:
        """Come to the next event."""
        count, digest, _ = self.last
        self.last = met = Met(count + 1, zlib.crc32(event.encode(), digest), event)
        self._kept[met.number % KEPT] = met

    def judge(self, rank: int, table: Mapping[int, Entry]) -> Verdict | None:
        """Say which ranks came to something else than this one."""
        for _, entry in sorted(table.items()):
            own = self._kept[entry.count % KEPT]
            if own is not None and own.number == entry.count and own.digest != entry.order:
                theirs = _ranks_at(entry.count, entry.order, table)
                ours = {rank, *_ranks_at(own.number, own.digest, table)}
                return Verdict(_difference((theirs, entry.event), (ours, own.event)), FAILED)
        return None


def _ranks_at(count: int, order: int, table: Mapping[int, Entry]) -> set[int]:
    return {rank for rank, e in table.items() if (e.count, e.order) == (count, order)}


def _difference(*groups: tuple[set[int], str]) -> str:
    # The same text whichever rank is first to see it: the fewer differ from the others.
    few, many = sorted(groups, key=lambda group: (len(group[0]), -min(group[0])))
    (ranks, event), (others, theirs) = few, many
    what = f"{rank_names(ranks)} came to {event}, where {rank_names(others)} came to {theirs}"
    if event == theirs:
        what = f"{rank_names(ranks)} came to {event} by another way than {rank_names(others)}"
    return (
        f"{what}. Every rank has to make the same steps, evaluations, checkpoints and barriers in "
        "the same order, and to have as many batches in an epoch: see what only one of them does"
    )
