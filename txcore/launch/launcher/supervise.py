"""Running the ranks of `txcore launch`: signals to them, and the first that fails."""

import contextlib
import dataclasses
import math
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

from txcore.launch.launcher import hosts
from txcore.launch.launcher.hosts import Rank, Task
from txcore.launch.launcher.output import copied
from txcore.launch.watch.status import FAILED, TRY_AGAIN

# How ranks end that have lost another: by the watch, which ends all others too, or by jax.
_ENDED_BY_THE_WATCH = (TRY_AGAIN, FAILED)
_LOST_A_PEER = (*_ENDED_BY_THE_WATCH, -signal.SIGABRT, 128 + signal.SIGABRT)
_WATCH_S = 5.0  # for the watch to end them, and for the rank behind it to say why
_SETTLE_S = 0.1  # a lost connection may be noticed before its cause, above all over ssh
_PATIENCE_S = 2.0  # before it says for whom it waits
_DEAD_S = 10.0  # after SIGKILL; a process that hangs in the kernel, or a lost connection


@dataclasses.dataclass
class _Run:
    """All ranks, those that failed in the order in which that was seen, and what comes when."""

    grace_s: float
    ranks: list[Rank] = dataclasses.field(default_factory=list)
    failed: list[Rank] = dataclasses.field(default_factory=list)
    asked: int | None = None  # the signal from outside that ends the run
    interrupted: bool = False
    say: Callable[[str], None] = print
    stop_at: float = math.inf
    say_at: float = math.inf
    kill_at: float = math.inf
    give_up_at: float = math.inf

    def live(self) -> list[Rank]:
        return [rank for rank in self.ranks if rank.code is None]

    def pids_here(self) -> list[int]:
        return [rank.process.pid for rank in self.live() if not rank.task.host]

    def stopping(self) -> bool:
        return min(self.kill_at, self.give_up_at) < math.inf


@dataclasses.dataclass(frozen=True)
class Failure:
    """The rank that failed first: how it ended, and the last lines of its stderr if in a file."""

    rank: int
    exit_code: int  # 128 + n for signal n
    text: str
    tail: list[str]


def launch(
    tasks: Sequence[Task],
    *,
    remote_shell: Sequence[str] = ("ssh",),
    output_dir: pathlib.Path | None = None,
    grace_s: float = 30.0,
) -> Failure | None:
    """Run ranks until all have ended; the first that fails ends the others.

    Signals that come meanwhile go to the ranks: call it on the main thread.

    Args:
      tasks: the ranks.
      remote_shell: the command that, with a host's name and a command after it, runs that there.
      output_dir: an existing folder for a file per rank and stream; None: our own stdout and
        stderr, where each line of several ranks begins with "[rank] ".
      grace_s: seconds from asking ranks to end to killing them.

    Returns:
      How the rank ended that failed first, or None.

    Raises:
      OSError: a rank cannot be started; none is left.

    Example:
      >>> from txcore.launch.launcher import hosts, supervise
      >>> supervise.launch([hosts.Task(0, ["sh", "-c", "exit 3"])]).exit_code
      3
    """
    run, alone = _Run(grace_s), len(tasks) == 1
    with hosts.signals() as arrived, hosts.watchman() as watch:
        try:
            for task in tasks:
                run.ranks.append(hosts.open_rank(task, remote_shell, output_dir, alone=alone))
                watch(run.pids_here())
            with copied(run.ranks, arrived) as run.say:
                while run.live():
                    _supervise(run, arrived, watch)
        finally:
            _clean_up(run)
    first = _first_failure(run.failed)
    return None if first is None else _failure(run, first)


def _supervise(run: _Run, arrived: int, watch: Callable[[list[int]], None]) -> None:
    """Wait until something happens, and do what follows from it."""
    until = min(run.stop_at, run.say_at, run.kill_at, run.give_up_at)
    numbers = hosts.read_signals(arrived, until)
    failed = _collect(run)
    if failed and not run.stopping():
        time.sleep(_SETTLE_S)
        failed += _collect(run)
        # Of those that end at once, the one that was killed is not the one that noticed it.
        failed.sort(key=lambda rank: (rank.code or 0) > 0)
    run.failed += failed
    watch(run.pids_here())
    unasked = [rank for rank in failed if not rank.ended_by_us()]
    if unasked and not run.stopping():
        watched = all(rank.code in _ENDED_BY_THE_WATCH for rank in unasked)
        run.stop_at = min(run.stop_at, time.monotonic() + _WATCH_S * watched)
    for number in numbers:
        _obey(run, number)
    _keep_time(run, time.monotonic())


def _collect(run: _Run) -> list[Rank]:
    """Take note of the ranks that have ended; return those that failed."""
    ended = [rank for rank in run.live() if rank.process.poll() is not None]
    for rank in ended:
        hosts.deliver(rank.process.pid, signal.SIGKILL)  # what it has left running
        rank.code = _code(rank)
    return [rank for rank in ended if rank.code]


def _code(rank: Rank) -> int:
    """Return how a rank ended; the far end of a remote shell says 128 + n for signal n."""
    code = rank.process.returncode
    return 128 - code if rank.task.host and 128 < code <= 128 + 64 else code


def _obey(run: _Run, number: int) -> None:
    """Do what a signal from outside asks for."""
    if number in hosts.PASSED:
        for rank in run.live():
            hosts.send(rank, number)
    if number not in hosts.STOPS:
        return
    if not run.failed:
        run.asked = run.asked or number
    _stop(run, number)
    if number == signal.SIGINT:
        if run.interrupted and run.give_up_at == math.inf:
            run.kill_at = 0.0
        run.interrupted = True


def _stop(run: _Run, number: int) -> None:
    """Ask the ranks to end, by each signal once."""
    now, run.stop_at = time.monotonic(), math.inf
    if not run.stopping():
        run.say_at, run.kill_at = now + _PATIENCE_S, now + run.grace_s
    for rank in run.live():
        if number not in rank.sent:
            rank.sent.add(number)
            hosts.send(rank, number)
            hosts.send(rank, signal.SIGCONT)  # one that is stopped would not see it


def _keep_time(run: _Run, now: float) -> None:
    """Ask the ranks to end, and kill them, when the time has come."""
    if now >= run.stop_at:
        _stop(run, signal.SIGTERM)
    if now >= run.say_at:
        run.say_at = math.inf
        names = ", ".join(str(rank.task.rank) for rank in run.live())
        left = max(0.0, run.kill_at - now)
        if names and left < math.inf:
            run.say(f"txcore: waiting {left:.0f} s for rank {names} to end")
    if now >= run.kill_at:
        run.kill_at, run.give_up_at = math.inf, now + _DEAD_S
        for rank in run.live():
            rank.sent.add(signal.SIGKILL)
            hosts.send(rank, signal.SIGKILL)
    if now >= run.give_up_at:
        _give_up(run)


def _give_up(run: _Run) -> None:
    """Leave those behind that SIGKILL does not end."""
    for rank in run.live():
        run.say(f"txcore: {rank} outlives SIGKILL by {_DEAD_S:.3g} s")
        hosts.deliver(rank.process.pid, signal.SIGKILL)  # a remote shell without connection
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.process.wait(1.0)
        rank.code = -signal.SIGKILL
        run.failed.append(rank)


def _clean_up(run: _Run) -> None:
    """Close what is open, after killing what runs still because something went wrong here."""
    left = run.live()
    for rank in left:
        hosts.send(rank, signal.SIGKILL)
    for rank in left:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.process.wait(_DEAD_S)
    pipes = [pipe for rank in left for pipe in (rank.process.stdout, rank.process.stderr)]
    for pipe in (*pipes, *(rank.process.stdin for rank in run.ranks)):
        if pipe is not None:
            pipe.close()


def _first_failure(failed: Sequence[Rank]) -> Rank | None:
    """Return the rank that failed by itself; else one that lost another; else one that we ended."""
    unasked = [rank for rank in failed if not rank.ended_by_us()]
    causes = [rank for rank in unasked if rank.code not in _LOST_A_PEER]
    return next(iter([*causes, *unasked, *failed]), None)


def _failure(run: _Run, first: Rank) -> Failure:
    code = first.code or 0
    how = f"was killed by {hosts.name_of(-code)}" if code < 0 else f"ended with exit code {code}"
    after = f"after {hosts.name_of(run.asked)} from outside " if run.asked else ""
    exit_code = code if code > 0 else 128 - code
    return Failure(first.task.rank, exit_code, f"{after}{first} {how}", first.tail())
