"""Watch the ranks of a run: if one dies or stalls, all others end and name it.

Every rank tells the others about once a second where it is. The loop calls `at` and `reach`, which
cost well under a microsecond; in a single process nothing is watched.
"""

import atexit
import faulthandler
import sys
from collections.abc import Callable
from types import TracebackType

from txcore import _compat
from txcore.launch.watch import shutdown
from txcore.launch.watch.status import Phase
from txcore.launch.watch.watcher import Watcher

Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]

_watcher = Watcher()


def start(*, peer_timeout_s: float = 10.0, step_timeout_s: float = 600.0) -> None:
    """Watch the ranks of this run from now on; in a single process there is nothing to watch.

    A rank that ends because of another one writes why to stderr, with the Python stacks of its
    threads. It exits with code 75 (EX_TEMPFAIL) if another attempt may succeed, and with 70
    (EX_SOFTWARE) if a rank failed by its own error.

    Args:
      peer_timeout_s: seconds after which a silent rank counts as lost. It has to be longer than
        Python may stand still on a healthy rank (in a call into C that keeps the GIL).
      step_timeout_s: seconds that a step may take, including the wait for the others.

    Raises:
      ValueError: a timeout is not positive.

    Example:
      >>> from txcore.launch import watch
      >>> watch.start(step_timeout_s=60)  # alone: nothing to watch
    """
    global _watcher
    if not (peer_timeout_s > 0 and step_timeout_s > 0):
        raise ValueError(
            "watch.start needs peer_timeout_s= and step_timeout_s= above 0, got "
            f"{peer_timeout_s} and {step_timeout_s}"
        )
    client, world = _compat.coordination_client(), _compat.coordination_size()
    if client is None or world == 1 or _watcher.is_watching():
        return
    _watcher = Watcher(
        client,
        _compat.coordination_rank(),
        world,
        peer_timeout_s=peer_timeout_s,
        step_timeout_s=step_timeout_s,
    )
    _show_stacks_of_aborts()
    sys.excepthook = _make_hook(sys.excepthook)
    # jax has registered its own exit function before, so that this one runs before it.
    atexit.register(shutdown.leave_run, _watcher)
    _watcher.start_threads(shutdown.end_process, shutdown.write_last_rank)


def _show_stacks_of_aborts() -> None:
    """Print Python's stacks if jax aborts the process."""
    try:
        if not faulthandler.is_enabled():
            faulthandler.enable()
    except (AttributeError, OSError, RuntimeError, ValueError):  # no stderr, or none with a file
        pass


def _make_hook(before: Hook) -> Hook:
    def tell_error(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if shutdown.speaks_of_a_lost_peer(
            error
        ):  # this ends the process, and prints the error last
            shutdown.report_failure(_watcher, error)
        before(kind, error, trace)  # printed before the others end and a launcher ends this one
        shutdown.report_failure(_watcher, error)

    return tell_error


def at(phase: Phase | str, step: int | None = None, label: str = "") -> None:
    """Note where this rank is; about 0.2 us.

    Args:
      phase: what the rank does: a `Phase` or its text ("data", "compile", "save"). In "step", "eval
        step" and "comparison" it waits for the other ranks, and has to finish within
        `step_timeout_s`: give these only for programs that span several processes.
      step: the current step; None for the one that was noted last.
      label: what is running, for the message of a rank that ends while waiting ("train_step, whose
        last collective is all-reduce grads (train.py:120)").

    Raises:
      ValueError: there is no such phase.

    Example:
      >>> from txcore.launch import watch
      >>> watch.at("step", 120, "train_step, whose last collective is psum/loss (train.py:31)")
    """
    if type(phase) is not Phase:
        phase = Phase(phase)
    _watcher.position = (phase, _watcher.position[1] if step is None else step, label)


def meet(event: str) -> None:
    """Note an event that every rank has, in the same order; about 1 us.

    Ranks whose events differ are named within seconds: an evaluation or a barrier of one rank
    alone, another number of batches. A slow rank never is. Steps, evaluations and checkpoints of an
    engine and `tx.barrier` note themselves; only events of the main thread are compared.

    Args:
      event: the same text on every rank: "batch 3 of epoch 1".

    Example:
      >>> from txcore.launch import watch
      >>> watch.meet("the exchange of counts")  # alone: nobody to compare with
    """
    _watcher.meet(event)


def reach(step: int) -> bool:
    """Reach the boundary before a step, and tell whether all ranks stop here.

    Every rank passes the same boundaries, in every loop whose steps span several processes. Once
    one is asked to stop, all stop before the same step, and at every later boundary.

    Args:
      step: the step that comes next, for messages; boundaries are counted by themselves.

    Returns:
      True if all ranks stop here: the step must not run.

    Example:
      >>> from txcore.launch import watch
      >>> watch.reach(0)
      False
    """
    return _watcher.reach(step)


def request_stop(reason: str) -> None:
    """Ask all ranks to stop before the same step; a signal handler may call it.

    Args:
      reason: the cause, such as "SIGTERM"; the first one counts.
    """
    _watcher.request_stop(reason)


def hear_of_end(rank: int, code: int) -> None:
    """Note on rank 0 that a rank has ended, as the launcher reports.

    Args:
      rank: the rank that has ended.
      code: its exit code, -n for signal n.
    """
    _watcher.hear_of_end(rank, code)


def stop_reason() -> str | None:
    """Return why the ranks are asked to stop ("SIGTERM on rank 1"), or None if they are not."""
    return _watcher.stop.reason


def failed(error: BaseException) -> None:
    """Tell the other ranks of an error that ends this one, so that they end too and name it.

    If another rank's end caused the error (a closed connection), this process ends here, as the
    others do, with the message about that rank and its own error. Otherwise it returns in a moment,
    and the caller raises the error again. Uncaught errors are reported without a call.

    Args:
      error: the exception.

    Example:
      >>> from txcore.launch import watch
      >>> try:
      ...     raise ValueError("batch 7 is damaged")
      ... except ValueError as error:
      ...     watch.failed(error)  # alone: nobody to tell
    """
    shutdown.report_failure(_watcher, error)
