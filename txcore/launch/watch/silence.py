"""Count the time that each rank has been silent while this process listened."""

from collections.abc import Mapping


class SilenceCounter:
    """Count the seconds since each rank was last heard of.

    The time from one reading of the table to the next counts, and a long gap counts as a short one:
    while this process or the coordinator stood still, no rank could be heard. So neither that nor a
    change of the wall clock makes a rank look dead.

    Args:
      world: the number of ranks.
      longest_gap_s: the most seconds that count of a gap between two readings.
    """

    def __init__(self, world: int, longest_gap_s: float) -> None:
        self.listened_s = 0.0
        self._longest_gap_s = longest_gap_s
        self._read_at: float | None = None
        self._last = dict.fromkeys(range(world), (-1, 0.0))  # counter, when it changed

    def take_in(self, beats: Mapping[int, int], now: float) -> None:
        """Take in the ranks' counters, read at `now` (seconds of a steady clock)."""
        if self._read_at is not None:
            self.listened_s += min(now - self._read_at, self._longest_gap_s)
        self._read_at = now
        for rank, beat in beats.items():
            if self._last.get(rank, (beat, 0.0))[0] != beat:
                self._last[rank] = (beat, self.listened_s)

    def silent_seconds(self) -> dict[int, float]:
        """Return the seconds for which each rank has been silent."""
        return {rank: self.listened_s - since for rank, (_, since) in self._last.items()}
