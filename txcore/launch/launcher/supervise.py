"""Running the ranks of `txcore launch`: signals to them, the first that fails, the last to end."""

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
from txcore.launch.launcher.hosts import Rank, Task
from txcore.launch.launcher.output import copied
from txcore.launch.watch.status import FAILED, TRY_AGAIN, how_ended, name_of, why_ended

# How ranks end that have lost another: by the watch, which ends all others too, or by jax.
_ENDED_BY_THE_WATCH = (TRY_AGAIN, FAILED)
_LOST_A_PEER = (*_ENDED_BY_THE_WATCH, -signal.SIGABRT, 128 + signal.SIGABRT)
_WATCH_S = 5.0  # for the watch to end them, and for the rank behind it to say why
_AFTER_WORDS_S = 5.0  # the grace where ranks have said why all have to end: nothing is saved then
_SAY_AFTER_S = (10.0, 60.0, 600.0)  # since the first rank ended well, for whom it waits
_TELL_AGAIN_S = 1.0  # between two tries to tell process 0 of a rank's end
_TELL_S = 600.0  # for so long; a program that is no run of txcore has nobody to be told
_IDLE_SHARE = 0.03  # of a core: the watch takes less than 1%
_LOOK_AGAIN_S = 10.0  # between two looks at what the last ranks do
_SETTLE_S = 0.1  # a lost connection may be noticed before its cause, above all over ssh
_PATIENCE_S = 2.0  # before it says for whom it waits
_DEAD_S = 10.0  # after SIGKILL; a process that hangs in the kernel, or a lost connection


@dataclasses.dataclass
class _Last:
    """The ranks that go on after others have ended well: since when, and what is told of them."""

    since: float = math.inf
    said: int = 0  # of _SAY_AFTER_S
    told: set[int] = dataclasses.field(default_factory=set)  # the ended ones, to process 0
    tell_at: float = math.inf
    look_at: float = math.inf
    busy: dict[int, float] = dataclasses.field(default_factory=dict)  # CPU seconds of the live ones
    idle_since: float = math.inf
    given_up: str = ""


@dataclasses.dataclass
class _Run:
    """All ranks, those that failed in the order in which that was seen, and what comes when."""

    grace_s: float
    idle_s: float = math.inf
    last: _Last = dataclasses.field(default_factory=_Last)
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

    def until(self) -> float:
        """Return when there is something to do, should nothing happen."""
        own = (self.stop_at, self.say_at, self.kill_at, self.give_up_at)
        return min(*own, self.last.tell_at, self.last.look_at)

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
    idle_s: float = 1800.0,
) -> Failure | None:
    """Run ranks until all have ended; the first that fails ends the others.

    Signals that come meanwhile go to the ranks: call it on the main thread.

    Args:
      tasks: the ranks.
      remote_shell: the command that, with a host's name and a command after it, runs that there.
      output_dir: an existing folder for a file per rank and stream; None: our own stdout and
        stderr, where each line of several ranks begins with "[rank] ".
      grace_s: seconds from asking ranks to end to killing them.
      idle_s: seconds after which ranks of this host are asked to end that do nothing though all
        others have ended well.

    Returns:
      How the rank ended that failed first, or None.

    Raises:
      OSError: a rank cannot be started; none is left.

    Example:
      >>> from txcore.launch.launcher import hosts, supervise
      >>> supervise.launch([hosts.Task(0, ["sh", "-c", "exit 3"])]).exit_code
      3
    """
    run, alone = _Run(grace_s, idle_s), len(tasks) == 1
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
    numbers = hosts.read_signals(arrived, run.until())
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
        watched = all(rank.code in _ENDED_BY_THE_WATCH for rank in unasked) or _tell(run, unasked)
        run.stop_at = min(run.stop_at, time.monotonic() + _WATCH_S * watched)
    for number in numbers:
        _obey(run, number)
    _keep_time(run, time.monotonic())


def _collect(run: _Run) -> list[Rank]:
    """Take note of the ranks that have ended; return those that failed."""
    ended = [rank for rank in run.live() if rank.process.poll() is not None]
    for rank in ended:
        hosts.deliver(rank.process.pid, signal.SIGKILL)  # what it has left running
        rank.code, rank.ended = _code(rank), time.monotonic()
        if rank.code == 0 and run.last.since == math.inf:
            now = run.last.since = run.last.look_at = time.monotonic()
            run.last.tell_at = now + 2 * _TELL_AGAIN_S  # most end at about the same time
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
        grace_s = min(run.grace_s, _AFTER_WORDS_S) if _why(run.ranks) else run.grace_s
        run.say_at, run.kill_at = now + _PATIENCE_S, now + grace_s
    for rank in run.live():
        if number not in rank.sent:
            rank.sent.add(number)
            hosts.send(rank, number)
            hosts.send(rank, signal.SIGCONT)  # one that is stopped would not see it


def _tell(run: _Run, ended: Sequence[Rank]) -> bool:
    """Tell process 0 which ranks have ended: it ends the others; say whether it has heard.

    In the meeting it refuses to wait for them, and later it has the watch name them.
    """
    variables = run.ranks[0].task.environment
    address, own = variables.get("JAX_COORDINATOR_ADDRESS"), variables.get(RUN_VARIABLE)
    if not address or not own or not run.live():
        return False
    causes = [rank for rank in ended if rank.code not in _LOST_A_PEER and rank.task.rank]
    heard = [rank for rank in causes if tell_of_end(address, own, rank.task.rank, rank.code or 0)]
    run.last.told |= {rank.task.rank for rank in heard}
    return bool(heard)


def _see_the_last(run: _Run, now: float) -> None:
    """Say who goes on after others have ended well; tell process 0; end those that do nothing."""
    last = run.last
    if run.stopping() or not run.live():
        last.tell_at = last.look_at = math.inf
        return
    if now >= last.tell_at:
        ended = [r for r in run.ranks if r.code == 0 and r.task.rank not in last.told]
        _tell(run, ended)
        last.tell_at = now + _TELL_AGAIN_S if now - last.since < _TELL_S else math.inf
    if now < last.look_at:
        return
    last.look_at = now + _LOOK_AGAIN_S
    before, local = last.busy, [rank for rank in run.live() if not rank.task.host]
    last.busy = {rank.task.rank: hosts.busy_s(rank.process.pid) for rank in local}
    shares = {r: (s - before[r]) / _LOOK_AGAIN_S for r, s in last.busy.items() if r in before}
    if last.said < len(_SAY_AFTER_S) and now - last.since >= _SAY_AFTER_S[last.said]:
        last.said += 1
        run.say(f"txcore: {_whom(run, now, shares)}")
    idle = len(shares) == len(run.live()) and sum(shares.values()) < _IDLE_SHARE
    last.idle_since = min(last.idle_since, now - _LOOK_AGAIN_S) if idle else math.inf
    if now - last.idle_since >= run.idle_s:
        names = ", ".join(map(str, run.live()))
        last.given_up = f"{names} did nothing for {run.idle_s:g} s after others had ended (--idle)"
        _stop(run, signal.SIGTERM)


def _whom(run: _Run, now: float, shares: Mapping[int, float]) -> str:
    """Return for whom the launcher waits, and what those do."""
    ended = [str(rank.task.rank) for rank in run.ranks if rank.code == 0]
    names = f"rank {ended[0]}" if len(ended) == 1 else f"{len(ended)} ranks"
    rows = []
    for rank in run.live():
        share = shares.get(rank.task.rank)
        does = f", which uses {share:.2g} of a core" if share is not None else ""
        idle = share is not None and share < _IDLE_SHARE
        rows.append(f"{rank}, which does nothing" if idle else f"{rank}{does}")
    return f"{names} ended {now - run.last.since:.0f} s ago; waiting for {'; '.join(rows)}"


def _keep_time(run: _Run, now: float) -> None:
    """Ask the ranks to end, and kill them, when the time has come."""
    _see_the_last(run, now)
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
    told = [rank for rank in unasked if rank.code in _ENDED_BY_THE_WATCH]  # by their words, not jax
    return next(iter([*causes, *told, *unasked, *failed]), None)


def _failure(run: _Run, first: Rank) -> Failure:
    code = first.code or 0
    text = f"{first} {how_ended(code)}"
    if run.asked:
        text = f"after {name_of(run.asked)} from outside {text}"
    elif run.last.given_up:
        text = f"{run.last.given_up}: {text}"
    elif _is_a_cause(first):
        early = [
            str(rank.task.rank) for rank in run.ranks if rank.code == 0 and rank.ended < first.ended
        ]
        if early:
            text += f"; rank {', '.join(early)} had ended with exit code 0 before"
    elif why := _why([first, *run.ranks]):
        text = f"{why}; so {text}"
    exit_code = code if code > 0 else 128 - code
    return Failure(first.task.rank, exit_code, text, first.tail())


def _is_a_cause(rank: Rank) -> bool:
    """Tell whether a rank failed by itself, neither by us nor by another one or a signal's stop."""
    stopped = {128 + signal.SIGTERM, 128 + signal.SIGINT}
    if rank.task.host:  # there both look alike
        stopped |= {-signal.SIGTERM, -signal.SIGINT}
    return not rank.ended_by_us() and rank.code not in {*_LOST_A_PEER, *stopped}


def _why(ranks: Sequence[Rank]) -> str | None:
    """Return why all had to end, by what the first of these ranks says that says it."""
    found = (why_ended(line) for rank in ranks for line in rank.own_words())
    return next((why for why in found if why is not None), None)
