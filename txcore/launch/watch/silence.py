"""For how long each rank has been silent, in time that was spent listening."""

from collections.abc import Mapping


class Hearing:
    """Count the seconds since each rank was last heard of.

    They are counted from one reading of the table to the next, and a long gap between two readings
    counts as a short one: while this process or the coordinator stood still, nobody could be heard.
    So neither that nor a change of the wall clock makes a rank look dead.

    Args:
      world: the number of ranks.
      longest_gap_s: what a gap between two readings counts as at most, in seconds.
    """

    def __init__(self, world: int, longest_gap_s: float) -> None:
        self.listened = 0.0
        self._longest_gap_s = longest_gap_s
        self._read_at: float | None = None
        self._last = dict.fromkeys(range(world), (-1, 0.0))  # counter, when it changed

    def hear(self, beats: Mapping[int, int], now: float) -> None:
        """Take in what was read of the ranks' counters at `now` (seconds of a steady clock)."""
        if self._read_at is not None:
            self.listened += min(now - self._read_at, self._longest_gap_s)
        self._read_at = now
        for rank, beat in beats.items():
            if self._last.get(rank, (beat, 0.0))[0] != beat:
                self._last[rank] = (beat, self.listened)

    def silent(self) -> dict[int, float]:
        """Return the seconds for which each rank has been silent."""
        return {rank: self.listened - since for rank, (_, since) in self._last.items()}
