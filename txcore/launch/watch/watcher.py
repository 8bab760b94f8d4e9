"""Watch the other ranks from one of them: write its entry, read theirs, judge the run."""

import contextlib
import functools
import math
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from txcore import _compat
from txcore.launch.watch.coordinator import CoordinatorWatch
from txcore.launch.watch.order import Order
from txcore.launch.watch.silence import SilenceCounter
from txcore.launch.watch.status import (
    FAILED,
    FOLDER,
    VERDICT,
    Phase,
    RankEntry,
    Verdict,
    read_entry,
    read_verdict,
)
from txcore.launch.watch.stop import Stop
from txcore.launch.watch.verdict import describe_lost_coordinator, describe_silence, judge_run

RANKS_PER_S = 250  # the coordinator serves so many ranks a second, with two calls for each
HURRY_S = 0.05  # between two readings while a thread waits for news in the table
OWN_THREADS = "txcore-"  # what the names of the watch's threads start with
TICK_S = 0.5  # between two looks at the clock
LAST_S = 30.0  # after which the last rank of a run writes what it is doing
JOIN_S = 2.0  # for a thread to end, on a busy machine
# Only the main thread's events are compared: those of other threads have no fixed order.
_MAIN = threading.main_thread().ident


class Watcher:
    """Watch the ranks of a run from one of them; nothing is watched without a `client`.

    About once a second one thread (`exchange_entries`) writes this rank's entry and reads all. A
    coordinator that stands still may block it. So a second thread (`guard_process`) looks at the
    clock, and ends the process once there is a verdict. The main thread only stores its position.
    """

    def __init__(
        self,
        client: Any = None,
        rank: int = 0,
        world: int = 1,
        *,
        peer_timeout_s: float = 10.0,
        step_timeout_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.client, self.rank, self.world, self.clock = client, rank, world, clock
        self.interval_s = max(min(1.0, peer_timeout_s / 5), world / RANKS_PER_S)
        self._hurry_s = max(HURRY_S, world / RANKS_PER_S)
        self.peer_timeout_s = max(peer_timeout_s, 3 * self.interval_s)
        self.step_timeout_s = step_timeout_s
        self.position = (Phase.START, 0, "")  # phase, step, label
        self.stop = Stop()
        self.order = Order()
        self.error: BaseException | None = None  # the error of this rank
        self.to_tell = RankEntry()  # failed, lost and ended, to be sent
        self.sent = RankEntry()  # the last entry that the coordinator took
        self.table: dict[int, RankEntry] = {}
        self.verdict: Verdict | None = None
        self.ends: dict[int, int] = {}  # the exit codes of ranks, told by the launcher
        self.answers = 0  # of the coordinator
        self.leaving = self.closed = self.coordinator_lost = self._quiet = False
        self._silences = SilenceCounter(world, 2 * self.interval_s)
        self._stood_still = (0.0, 0.0)  # this process: seconds, and when it went on
        self._since: tuple[Any, str, float] = (None, "", 0.0)  # position, loss, when first seen
        self._met: tuple[int, float] = (0, 0.0)  # the last event's count, when first seen
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # a signal handler may put
        self._coordinator: CoordinatorWatch | None = None
        self._threads: list[threading.Thread] = []
        self._pid = os.getpid()

    def is_watching(self) -> bool:
        """Tell whether this process watches others; a fork of it does not."""
        return self.client is not None and not self.closed and os.getpid() == self._pid

    # What the main thread calls.

    def reach(self, step: int) -> bool:
        """Reach the boundary before `step`; tell whether to stop there."""
        self.position = (Phase.BETWEEN_STEPS, step, "")
        self.stop.reach_boundary()
        if self.client is None:
            return self.stop.reason is not None
        while (decided := self.stop.decide_stop()) is None and not self.closed:
            time.sleep(0.002)
        return decided is not False

    def meet(self, event: str) -> None:
        """Note an event that every rank has, in the same order."""
        if self.client is not None and threading.get_ident() == _MAIN:
            self.order.add_event(event.replace("\n", " "))

    def request_stop(self, reason: str) -> None:
        """Ask all ranks to stop; a signal handler may call it."""
        if self.stop.reason is None:
            self.stop.reason = reason if self.client is None else f"{reason} on rank {self.rank}"
            self._wake.put(None)

    def tell_others(self, **changes: Any) -> None:
        """Tell the others at once that this rank has `failed`, `lost` a connection or `ended`."""
        self.to_tell = replace(self.to_tell, **changes)
        self._wake.put(None)

    def hear_of_end(self, rank: int, code: int) -> None:
        """Note that a rank has ended; the thread at the coordinator's port calls it."""
        self.ends = self.ends | {rank: code}
        self._wake.put(None)

    def others_left(self) -> set[int]:
        """Return the other ranks that are not known to have ended."""
        ended = {rank for rank, entry in self.table.items() if entry.ended}
        return set(range(self.world)) - ended - {self.rank}

    def silent_ranks(self) -> set[int]:
        """Return the ranks that have been silent for a while."""
        silent = self._silences.silent_seconds()
        return {rank for rank, seconds in silent.items() if seconds > 2 * self.interval_s}

    def stood_still_s(self) -> float:
        """Return the seconds for which this process has just stood still; 0 if it did not."""
        seconds, when = self._stood_still
        return seconds if self.clock() - when < 2 * self.peer_timeout_s else 0.0

    # What the first thread does.

    def exchange_entries(self) -> None:
        """Write this rank's entry, and read those of the others.

        Raises:
          RuntimeError: the coordinator refuses.
        """
        entry = self._make_entry()
        self.client.key_value_set(f"{FOLDER}{self.rank}", entry.to_json(), True)
        self.sent = entry
        rows = dict(self.client.key_value_dir_get(FOLDER))
        self.answers += 1
        read = {r: read_entry(rows.get(f"{FOLDER}{r}", "")) for r in range(self.world)}
        # A new dict, since other threads may be iterating over the old one.
        self.table = self.table | {rank: e for rank, e in read.items() if e is not None}
        self._silences.take_in({r: e.beat for r, e in self.table.items()}, self.clock())
        self.stop.take_in(self.table, self.world)
        if self.verdict is None:
            self.verdict = read_verdict(rows.get(VERDICT, "")) or self._judge_run()

    def _make_entry(self) -> RankEntry:
        position, told, listened = self.position, self.to_tell, self._silences.listened_s
        if position is not self._since[0] or told.lost != self._since[1]:
            self._since = (position, told.lost, listened)
        phase, step, _ = position
        seconds = round(listened - self._since[2], 1)
        stop, reason = self.stop.own_proposal(), self.stop.reason or ""
        met = self.order.entry_fields()
        if met["count"] != self._met[0]:
            self._met = (met["count"], listened)
        return replace(
            told,
            beat=self.sent.beat + 1,
            step=step,
            phase=str(phase),
            seconds=seconds,
            stop=stop,
            reason=reason,
            **met,
            waits=round(listened - self._met[1], 1),
        )

    def _judge_run(self) -> Verdict | None:
        """Judge the run, and give all ranks the same verdict: that of the first to judge."""
        verdict = judge_run(
            self.table,
            self._silences.silent_seconds(),
            peer_timeout_s=self.peer_timeout_s,
            suspect_s=max(3 * self.interval_s, self.peer_timeout_s / 3),
            step_timeout_s=self.step_timeout_s,
            order=lambda table: self.order.judge(self.rank, table),
            ends=self.ends,
        )
        if verdict is None:
            return None
        try:
            self.client.key_value_set(VERDICT, verdict.to_json(), False)
        except RuntimeError:  # another rank was faster
            rows = dict(self.client.key_value_dir_get(FOLDER))
            return read_verdict(rows.get(VERDICT, "")) or verdict
        return verdict

    def wait_for_turn(self) -> None:
        """Wait until the next exchange is due."""
        asked = self.stop.reason is not None and self.stop.target is None
        waited_for = self.to_tell != RankEntry() or asked
        with contextlib.suppress(queue.Empty):
            self._wake.get(timeout=self._hurry_s if waited_for else self.interval_s)

    # What the second thread does.

    def guard_process(
        self,
        lifeline: CoordinatorWatch,
        end: Callable[["Watcher", Verdict], object],
        say_last: Callable[["Watcher", float], object] = lambda watcher, seconds: None,
    ) -> None:
        """Call `end` with the verdict once there is one; `say_last` once all others have ended.

        `say_last` is called once, with the seconds since the others ended.
        """
        waited, answers, before = 0.0, self.answers, self.clock()
        alone_since = math.inf
        while not self.closed:
            hung_up = lifeline.wait(min(TICK_S, self.interval_s / 2))
            now = self.clock()
            # As in SilenceCounter: time in which this process stood still does not count.
            waited = waited + min(now - before, 2 * TICK_S) if answers == self.answers else 0.0
            if now - before > self.peer_timeout_s / 2:
                self._stood_still = (now - before, now)
            answers, before = self.answers, now
            if not self.table or self.others_left() or self.to_tell.ended or self.to_tell.failed:
                alone_since = math.inf
            elif alone_since == math.inf:
                alone_since = now
            elif now - alone_since >= LAST_S:
                say_last(self, now - alone_since)
                alone_since = math.nan  # call it only once
            verdict = self.find_verdict(waited, hung_up)
            if verdict is not None and not self.closed and self.is_connected():
                end(self, verdict)

    def find_verdict(self, waited_s: float, hung_up: bool) -> Verdict | None:
        """Return the verdict that ends this process now, or None to go on.

        Args:
          waited_s: seconds without an answer from the coordinator.
          hung_up: whether its connections are closed.
        """
        # A rank that failed, or reached the end of its program, keeps its own exit code.
        own = self.to_tell.failed or self.to_tell.ended
        if self.verdict is not None and not (own and self.verdict.code == FAILED):
            return self.verdict
        unheard = waited_s >= self.peer_timeout_s
        self.coordinator_lost = unheard or (hung_up and not self.leaving)
        if not self.coordinator_lost:
            return None
        text = (
            describe_silence([0], waited_s, self.table)
            if unheard
            else describe_lost_coordinator(self.table)
        )
        return Verdict(text)

    # The threads.

    def is_connected(self) -> bool:
        """Tell whether jax still has the client that this was started with."""
        try:
            return _compat.coordination_client() is self.client
        except RuntimeError:  # jax.distributed.shutdown() was called
            return False

    def start_threads(
        self,
        end: Callable[["Watcher", Verdict], object],
        say_last: Callable[["Watcher", float], object] = lambda watcher, seconds: None,
    ) -> None:
        """Start watching; the callables are those of `guard_process`."""
        self._coordinator = CoordinatorWatch(
            None if self.rank == 0 else _compat.coordinator_address()
        )
        guard = functools.partial(self.guard_process, self._coordinator, end, say_last)
        for name, run in (("exchange", self._keep_exchanging), ("guard", guard)):
            thread = threading.Thread(
                target=self._run_watch, args=(run,), daemon=True, name=OWN_THREADS + name
            )
            self._threads.append(thread)
            thread.start()

    def stop_exchanges(self) -> bool:
        """End the first thread, on rank 0 after all others have disconnected; tell if it ended.

        On other ranks the second thread ends the process if the coordinator blocks the first.
        """
        self._quiet = True
        self._wake.put(None)
        for thread in self._threads[:1]:
            thread.join(self.peer_timeout_s if self.rank == 0 else 2 * self.peer_timeout_s)
        return not any(thread.is_alive() for thread in self._threads[:1])

    def stop_threads(self) -> None:
        """End both threads."""
        self.closed = True
        self._wake.put(None)
        if self._coordinator is not None:
            self._coordinator.wake()
        for thread in self._threads:
            thread.join(JOIN_S)
        if self._coordinator is not None and not any(t.is_alive() for t in self._threads):
            self._coordinator.close()

    def _run_watch(self, watch: Callable[[], object]) -> None:
        try:
            watch()
        except BaseException:  # a fault of the watch must end the watch alone
            self.closed = True
            raise

    def _keep_exchanging(self) -> None:
        while not (self.closed or self._quiet):
            try:
                self.exchange_entries()
            except RuntimeError:
                self.closed = self.closed or not self.is_connected()
            if self.verdict is not None and self._coordinator is not None:
                self._coordinator.wake()
            self.wait_for_turn()
        if self._quiet and self.rank == 0:
            self._await_disconnects()

    def _await_disconnects(self) -> None:
        try:  # returns once every connected rank has called it: only rank 0 does
            self.client.get_live_nodes(list(range(self.world)))
        except (AttributeError, RuntimeError):
            time.sleep(TICK_S)
