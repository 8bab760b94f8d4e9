"""The order in which ranks come to what needs all of them: steps, evaluations, barriers."""

import zlib
from collections.abc import Iterable, Mapping
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
                said = (entry.count, entry.order)
                alike = [r for r, e in table.items() if (e.count, e.order) == said]
                like = [r for r, e in table.items() if (e.count, e.order) == own[:2]]
                return Verdict(_difference(alike, entry.event, {rank, *like}, own.event), FAILED)
        return None


def _difference(ranks: Iterable[int], theirs: str, others: Iterable[int], own: str) -> str:
    what = f"{rank_names(ranks)} came to {theirs}, where {rank_names(others)} came to {own}"
    if theirs == own:
        what = f"{rank_names(ranks)} came to {own} by another way than {rank_names(others)}"
    return (
        f"{what}. Every rank has to make the same steps, evaluations, checkpoints and barriers in "
        "the same order, and to have as many batches in an epoch: see what only one of them does"
    )
