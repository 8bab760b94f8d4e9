"""Agree with the other ranks on the step before which all of them stop."""

import threading
from collections.abc import Mapping

from txcore.launch.watch.status import RankEntry


class Stop:
    """Stop all ranks before the same step, once any of them is asked to.

    The ranks pass the same boundaries between steps, but not at the same time. Once one is asked
    to stop, each rank proposes the boundary after the last one that it has reached, in its entry of
    the table, and does not pass that boundary until it knows all proposals. All stop at the largest
    one: no rank has passed it, and every rank can reach it, since those with smaller proposals go
    on.

    Two threads use it: the main one reaches boundaries, the other one writes and reads the table.
    The latter proposes even while the main thread waits in a step for a rank that waits at its
    boundary.
    """

    def __init__(self) -> None:
        self.reason: str | None = None  # why, once a rank was asked to stop
        self.target: int | None = None  # the boundary at which all stop, once agreed on
        self._lock = threading.Lock()
        self._reached = 0
        self._proposal: int | None = None

    def reach_boundary(self) -> None:
        """Reach the next boundary (main thread)."""
        with self._lock:
            self._reached += 1

    def decide_stop(self) -> bool | None:
        """Return whether to stop at this boundary; None: not known yet (main thread)."""
        if self._proposal is None or self._reached < self._proposal:
            return False
        return None if self.target is None else self._reached >= self.target

    def own_proposal(self) -> int | None:
        """Return this rank's proposal, None if no rank was asked to stop (the table's thread)."""
        with self._lock:  # the main thread must not pass the boundary that is being chosen
            if self._proposal is None and self.reason is not None:
                self._proposal = self._reached + 1
        return self._proposal

    def take_in(self, table: Mapping[int, RankEntry], world: int) -> None:
        """Take in the other ranks' proposals (the table's thread)."""
        proposals = [entry.stop for entry in table.values() if entry.stop is not None]
        if self.reason is None and proposals:
            self.reason = next((e.reason for e in table.values() if e.reason), "asked to stop")
        # A rank that ended its program without a proposal reaches no further boundary.
        answered = [e for e in table.values() if e.stop is not None or e.ended]
        if proposals and len(answered) == world:
            self.target = max(proposals)
