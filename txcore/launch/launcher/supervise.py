"""Run the ranks of `txcore launch`: pass signals on, end all after the first failure."""

import contextlib
import dataclasses
import math
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

from txcore.launch.join.rendezvous import RUN_VARIABLE, tell_of_end
from txcore.launch.launcher import hosts
from txcore.launch.launcher.failure import (
    ENDED_BY_THE_WATCH,
    LOST_A_PEER,
    Failure,
    find_failure,
    find_reason,
)
from txcore.launch.launcher.hosts import Rank, Task
from txcore.launch.launcher.output import copy_output

_WATCH_S = 5.0  # for the watch to end the ranks, and for the failed rank to write why
_AFTER_WORDS_S = 5.0  # the grace once ranks have written why all end: nothing is saved then
_SAY_AFTER_S = (10.0, 60.0, 600.0)  # after the first rank ended well: name the ones waited for
_TELL_AGAIN_S = 1.0  # between two tries to tell process 0 of a rank's end
_TELL_S = 600.0  # between the first try and the last; a program without txcore never answers
_IDLE_SHARE = 0.03  # of a core: the watch takes less than 1%
_LOOK_AGAIN_S = 10.0  # between two looks at what the last ranks do
_SETTLE_S = 0.1  # a lost connection may be seen before its cause, above all over ssh
_PATIENCE_S = 2.0  # before naming the ranks that it waits for
_DEAD_S = 10.0  # after SIGKILL: a process may hang in the kernel, or its connection may be lost


@dataclasses.dataclass
class _LastRanks:
    """Follow the ranks that go on after others have ended well; times are of a steady clock.

    Attributes:
      since: when the first rank ended well.
      times_said: the number of _SAY_AFTER_S that have passed.
      reported: the ended ranks that process 0 has been told of.
      report_at: when to report to process 0 next.
      look_at: when to look at the live ranks next.
      busy: CPU seconds of the live ranks.
      idle_since: when the live ranks were first found idle.
      given_up: why the launcher ended them; "" if it did not.
    """

    since: float = math.inf
    times_said: int = 0
    reported: set[int] = dataclasses.field(default_factory=set)
    report_at: float = math.inf
    look_at: float = math.inf
    busy: dict[int, float] = dataclasses.field(default_factory=dict)
    idle_since: float = math.inf
    given_up: str = ""


@dataclasses.dataclass
class _Launch:
    """Hold the state of a launch; the times at which to act are of a steady clock.

    Attributes:
      grace_s: seconds from asking ranks to end to killing them.
      idle_s: seconds after which idle ranks are ended.
      last: the ranks that go on after others.
      ranks: all of them.
      failed: those that failed, in the order in which the launcher noticed.
      asked: the signal from outside that ends the run; None without one.
      interrupted: whether SIGINT has come.
      write_line: the function that writes a line of the launcher's own.
      stop_at, say_at, kill_at, give_up_at: when to ask the ranks to end, to name those that are
        left, to kill them, and to leave them behind.
    """

    grace_s: float
    idle_s: float = math.inf
    last: _LastRanks = dataclasses.field(default_factory=_LastRanks)
    ranks: list[Rank] = dataclasses.field(default_factory=list)
    failed: list[Rank] = dataclasses.field(default_factory=list)
    asked: int | None = None
    interrupted: bool = False
    write_line: Callable[[str], None] = print
    stop_at: float = math.inf
    say_at: float = math.inf
    kill_at: float = math.inf
    give_up_at: float = math.inf

    def live_ranks(self) -> list[Rank]:
        return [rank for rank in self.ranks if rank.code is None]

    def pids_here(self) -> list[int]:
        return [rank.process.pid for rank in self.live_ranks() if not rank.task.host]

    def next_time(self) -> float:
        """Return the next time at which to act if no signal comes before."""
        own = (self.stop_at, self.say_at, self.kill_at, self.give_up_at)
        return min(*own, self.last.report_at, self.last.look_at)

    def is_stopping(self) -> bool:
        return min(self.kill_at, self.give_up_at) < math.inf


def launch_ranks(
    tasks: Sequence[Task],
    *,
    remote_shell: Sequence[str] = ("ssh",),
    output_dir: pathlib.Path | None = None,
    grace_s: float = 30.0,
    idle_s: float = 1800.0,
) -> Failure | None:
    """Run ranks until all have ended; the first that fails ends the others.

    Signals that come meanwhile go to the ranks: call it on the main thread.

    Args:
      tasks: the ranks.
      remote_shell: the command that runs another one on a host, as in `ssh HOST COMMAND`.
      output_dir: an existing folder for a file per rank and stream; None: our own stdout and
        stderr, where each line of several ranks begins with "[rank] ".
      grace_s: seconds from asking ranks to end to killing them.
      idle_s: seconds without CPU time after which the last ranks are asked to end, if they are all
        on this host and the others have ended well.

    Returns:
      The failure of the rank that failed first, or None.

    Raises:
      OSError: a rank cannot be started; the others are ended first.

    Example:
      >>> from txcore.launch.launcher import hosts, supervise
      >>> supervise.launch_ranks([hosts.Task(0, ["sh", "-c", "exit 3"])]).exit_code
      3
    """
    run, alone = _Launch(grace_s, idle_s), len(tasks) == 1
    with hosts.collect_signals() as arrived, hosts.start_watchman() as watch:
        try:
            for task in tasks:
                run.ranks.append(hosts.open_rank(task, remote_shell, output_dir, alone=alone))
                watch(run.pids_here())
            with copy_output(run.ranks, arrived) as run.write_line:
                while run.live_ranks():
                    _await_and_react(run, arrived, watch)
        finally:
            _clean_up(run)
    return find_failure(run.ranks, run.failed, asked=run.asked, given_up=run.last.given_up)


def _await_and_react(run: _Launch, arrived: int, watch: Callable[[list[int]], None]) -> None:
    """Wait for a signal, an ended rank or the next time to act, and react to it."""
    numbers = hosts.read_signals(arrived, run.next_time())
    failed = _collect_ended(run)
    if failed and not run.is_stopping():
        time.sleep(_SETTLE_S)
        failed += _collect_ended(run)
        # Of several that end at once, a killed one comes first: the others ended because of it.
        failed.sort(key=lambda rank: (rank.code or 0) > 0)
    run.failed += failed
    watch(run.pids_here())
    unasked = [rank for rank in failed if not rank.ended_by_us()]
    if unasked and not run.is_stopping():
        # The watch ends the others: give it time to write why before we end them ourselves.
        watched = all(rank.code in ENDED_BY_THE_WATCH for rank in unasked)
        wait_s = _WATCH_S if watched or _report_ends(run, unasked) else 0.0
        run.stop_at = min(run.stop_at, time.monotonic() + wait_s)
    for number in numbers:
        _obey_signal(run, number)
    _act_on_time(run, time.monotonic())


def _collect_ended(run: _Launch) -> list[Rank]:
    """Note which ranks have ended; return those that failed."""
    ended = [rank for rank in run.live_ranks() if rank.process.poll() is not None]
    for rank in ended:
        hosts.deliver_signal(rank.process.pid, signal.SIGKILL)  # what it has left running
        rank.code, rank.ended = _exit_code(rank), time.monotonic()
        if rank.code == 0 and run.last.since == math.inf:
            now = run.last.since = run.last.look_at = time.monotonic()
            run.last.report_at = now + 2 * _TELL_AGAIN_S  # most ranks end at about the same time
    return [rank for rank in ended if rank.code]


def _exit_code(rank: Rank) -> int:
    """Return how a rank ended; the far end of a remote shell returns 128 + n for signal n."""
    code = rank.process.returncode
    return 128 - code if rank.task.host and 128 < code <= 128 + 64 else code


def _obey_signal(run: _Launch, number: int) -> None:
    """Pass on or obey a signal from outside."""
    if number in hosts.PASSED:
        for rank in run.live_ranks():
            hosts.send_signal(rank, number)
    if number not in hosts.STOPS:
        return
    if not run.failed:
        run.asked = run.asked or number
    _ask_to_end(run, number)
    if number == signal.SIGINT:
        if run.interrupted and run.give_up_at == math.inf:
            run.kill_at = 0.0
        run.interrupted = True


def _ask_to_end(run: _Launch, number: int) -> None:
    """Ask the ranks to end, sending each signal once."""
    now, run.stop_at = time.monotonic(), math.inf
    if not run.is_stopping():
        grace_s = min(run.grace_s, _AFTER_WORDS_S) if find_reason(run.ranks) else run.grace_s
        run.say_at, run.kill_at = now + _PATIENCE_S, now + grace_s
    for rank in run.live_ranks():
        if number not in rank.sent:
            rank.sent.add(number)
            hosts.send_signal(rank, number)
            hosts.send_signal(rank, signal.SIGCONT)  # a stopped process would not receive it


def _report_ends(run: _Launch, ended: Sequence[Rank]) -> bool:
    """Report ended ranks to process 0, which ends the others; tell whether it has received it.

    During the meeting process 0 stops waiting for them; later it has the watch name them.
    """
    variables = run.ranks[0].task.environment
    address, own = variables.get("JAX_COORDINATOR_ADDRESS"), variables.get(RUN_VARIABLE)
    if not address or not own or not run.live_ranks():
        return False
    causes = [rank for rank in ended if rank.code not in LOST_A_PEER and rank.task.rank]
    heard = [rank for rank in causes if tell_of_end(address, own, rank.task.rank, rank.code or 0)]
    run.last.reported |= {rank.task.rank for rank in heard}
    return bool(heard)


def _watch_last_ranks(run: _Launch, now: float) -> None:
    """Name the ranks that go on after others have ended well; end them if they do nothing."""
    last = run.last
    if run.is_stopping() or not run.live_ranks():
        last.report_at = last.look_at = math.inf
        return
    if now >= last.report_at:
        ended = [r for r in run.ranks if r.code == 0 and r.task.rank not in last.reported]
        _report_ends(run, ended)
        last.report_at = now + _TELL_AGAIN_S if now - last.since < _TELL_S else math.inf
    if now < last.look_at:
        return
    last.look_at = now + _LOOK_AGAIN_S
    before, local = last.busy, [rank for rank in run.live_ranks() if not rank.task.host]
    last.busy = {rank.task.rank: hosts.busy_s(rank.process.pid) for rank in local}
    shares = {r: (s - before[r]) / _LOOK_AGAIN_S for r, s in last.busy.items() if r in before}
    if last.times_said < len(_SAY_AFTER_S) and now - last.since >= _SAY_AFTER_S[last.times_said]:
        last.times_said += 1
        run.write_line(f"txcore: {_describe_waiting(run, now, shares)}")
    idle = len(shares) == len(run.live_ranks()) and sum(shares.values()) < _IDLE_SHARE
    last.idle_since = min(last.idle_since, now - _LOOK_AGAIN_S) if idle else math.inf
    if now - last.idle_since >= run.idle_s:
        names = ", ".join(map(str, run.live_ranks()))
        last.given_up = f"{names} did nothing for {run.idle_s:g} s after others had ended (--idle)"
        _ask_to_end(run, signal.SIGTERM)


def _describe_waiting(run: _Launch, now: float, shares: Mapping[int, float]) -> str:
    """Describe the ranks that the launcher waits for, and whether they use the CPU."""
    ended = [str(rank.task.rank) for rank in run.ranks if rank.code == 0]
    names = f"rank {ended[0]}" if len(ended) == 1 else f"{len(ended)} ranks"
    rows = []
    for rank in run.live_ranks():
        share = shares.get(rank.task.rank)
        does = f", which uses {share:.2g} of a core" if share is not None else ""
        idle = share is not None and share < _IDLE_SHARE
        rows.append(f"{rank}, which does nothing" if idle else f"{rank}{does}")
    return f"{names} ended {now - run.last.since:.0f} s ago; waiting for {'; '.join(rows)}"


def _act_on_time(run: _Launch, now: float) -> None:
    """Ask the ranks to end, and kill them, when it is time."""
    _watch_last_ranks(run, now)
    if now >= run.stop_at:
        _ask_to_end(run, signal.SIGTERM)
    if now >= run.say_at:
        run.say_at = math.inf
        names = ", ".join(str(rank.task.rank) for rank in run.live_ranks())
        left = max(0.0, run.kill_at - now)
        if names and left < math.inf:
            run.write_line(f"txcore: waiting {left:.0f} s for rank {names} to end")
    if now >= run.kill_at:
        run.kill_at, run.give_up_at = math.inf, now + _DEAD_S
        for rank in run.live_ranks():
            rank.sent.add(signal.SIGKILL)
            hosts.send_signal(rank, signal.SIGKILL)
    if now >= run.give_up_at:
        _give_up(run)


def _give_up(run: _Launch) -> None:
    """Give up the ranks that SIGKILL does not end."""
    for rank in run.live_ranks():
        run.write_line(f"txcore: {rank} outlives SIGKILL by {_DEAD_S:.3g} s")
        hosts.deliver_signal(rank.process.pid, signal.SIGKILL)  # a remote shell without connection
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.process.wait(1.0)
        rank.code = -signal.SIGKILL
        run.failed.append(rank)


def _clean_up(run: _Launch) -> None:
    """Kill the ranks that still run because of an error here, and close all pipes."""
    left = run.live_ranks()
    for rank in left:
        hosts.send_signal(rank, signal.SIGKILL)
    for rank in left:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.process.wait(_DEAD_S)
    pipes = [pipe for rank in left for pipe in (rank.process.stdout, rank.process.stderr)]
    for pipe in (*pipes, *(rank.process.stdin for rank in run.ranks)):
        if pipe is not None:
            pipe.close()
