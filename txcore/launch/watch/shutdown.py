"""End a rank's part in the run: by its own error, by a verdict, or at the end of its program.

Rank 0's process is the coordinator. jax aborts (SIGABRT) every process that is still connected when
it ends, so rank 0 ends last.
"""

import contextlib
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable

from txcore.launch.watch.status import Verdict
from txcore.launch.watch.verdict import last_seen, rank_names
from txcore.launch.watch.watcher import OWN_THREADS, Watcher

LONGEST_ERROR = 600  # characters of an error that the other ranks get
GRACE_S = 2.0  # that rank 0 waits for the others when a verdict ends the run
AT_MOST_S = 8.0  # for ending, even if stderr is blocked
DEEPEST = 60  # frames of a stack that are shown
PATIENCE_S = 5.0  # before rank 0 names at its end the ranks that it waits for

# The errors of gloo, NCCL and the coordination service about a lost peer.
_LOST = re.compile(
    r"\b(gloo|nccl)\b|connection (reset|closed|refused|aborted)|socket closed|broken pipe"
    r"|timed out waiting \d+ ?ms|coordination service|^unavailable",
    re.IGNORECASE,
)


def speaks_of_a_lost_peer(error: BaseException) -> bool:
    """Tell whether another rank's end caused a step's error."""
    # jax raises a ValueError or its own kind of RuntimeError, by its version.
    return isinstance(error, (RuntimeError, ValueError)) and bool(_LOST.search(str(error)))


def report_failure(watcher: Watcher, error: BaseException) -> None:
    """Tell the others of this rank's error, or end with them if another rank caused it."""
    alike = getattr(error, "every_rank", False)  # all ranks raise it and may go on
    if not watcher.is_watching() or watcher.error is not None or alike:
        return
    watcher.error = error
    if speaks_of_a_lost_peer(error):
        watcher.tell_others(lost=describe_error(error))
        # Some rank finds out who is lost; then the verdict ends this process while it waits here.
        wait_until(watcher, lambda: False, 3 * watcher.peer_timeout_s + AT_MOST_S)
    watcher.tell_others(failed=describe_error(error))
    seconds = 2 * watcher.interval_s + GRACE_S
    if not wait_until(watcher, lambda: bool(watcher.sent.failed), seconds):
        return
    if watcher.rank == 0:
        wait_until(watcher, lambda: not watcher.others_left(), seconds)
    else:
        # The coordinator may then end before this rank's exception is printed.
        _disconnect_rank(watcher)


def describe_error(error: BaseException) -> str:
    """Return an error's type and message in one line of bounded length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= LONGEST_ERROR else text[: LONGEST_ERROR - 3] + "..."


def leave_run(watcher: Watcher) -> None:
    """Leave the run at the end of the program."""
    if not watcher.is_watching():
        return
    if watcher.rank != 0:
        _disconnect_rank(watcher)
        return
    watcher.tell_others(ended=True)
    if watcher.error is None:  # otherwise report_failure has waited
        _see_the_others_off(watcher)
    # A rank that was killed after it had ended looks connected for minutes.
    if watcher.verdict is None and not watcher.others_left() and not watcher.stop_exchanges():
        _shut_down_jax()
    watcher.stop_threads()


def _disconnect_rank(watcher: Watcher) -> None:
    watcher.leaving = True
    watcher.tell_others(ended=True)
    if wait_until(watcher, lambda: watcher.sent.ended, watcher.interval_s + GRACE_S):
        # Rank 0 ends once this rank is disconnected. A thread with a pending call to it would then
        # return into a Python that has ended, and abort.
        watcher.stop_exchanges()
        _shut_down_jax()
    watcher.stop_threads()


def _shut_down_jax() -> None:
    import jax

    jax.distributed.shutdown()


def _see_the_others_off(watcher: Watcher) -> None:
    """Wait until every other rank has ended, by itself or by a verdict."""

    def others_gone() -> bool:
        others = watcher.others_left()
        return not others or (watcher.verdict is not None and others <= watcher.silent_ranks())

    if not wait_until(watcher, others_gone, PATIENCE_S) and watcher.others_left():
        have = "has" if len(watcher.others_left()) == 1 else "have"
        _write_stderr(
            "txcore: rank 0 has finished, and stays as the coordinator until "
            f"{rank_names(watcher.others_left())} {have} finished too"
            f"{last_seen(watcher.others_left(), watcher.table)}\n"
        )
    wait_until(watcher, others_gone, float("inf"))


def end_process(
    watcher: Watcher, verdict: Verdict, exit_: Callable[[int], object] = os._exit
) -> None:
    """Write why this rank ends and where it stands, and end the process."""
    name = f"{OWN_THREADS}end-anyway"
    with contextlib.suppress(RuntimeError):  # Python is ending, and starts no thread
        threading.Thread(target=_end_anyway, args=(verdict.code,), daemon=True, name=name).start()
    _flush_streams()
    write_verdict(watcher, verdict)
    if watcher.error is not None:
        _write_stderr("".join(traceback.format_exception(watcher.error)))
    _write_stderr(format_stacks())
    if watcher.coordinator_lost:  # nobody to disconnect from, and jax is about to abort
        exit_(verdict.code)
    watcher.tell_others(ended=True)
    wait_until(watcher, lambda: watcher.sent.ended, GRACE_S / 2)
    if watcher.rank == 0:
        seconds = GRACE_S + 2 * watcher.interval_s
        wait_until(watcher, lambda: watcher.others_left() <= watcher.silent_ranks(), seconds)
        time.sleep(GRACE_S / 8)  # for the others to exit after their last message
    exit_(verdict.code)


def write_verdict(watcher: Watcher, verdict: Verdict) -> None:
    """Write the verdict, and what this rank was running, to stderr in one piece."""
    phase, step, label = watcher.position
    text = f"txcore: rank {watcher.rank} ends at step {step} ({phase}): {verdict.text}"
    if seconds := watcher.stood_still_s():
        text += f" (this rank itself had stood still for {seconds:.0f} s)"
    if label:
        text += f"\ntxcore: rank {watcher.rank} was in {label}"
    _write_stderr(text + "\n")


def write_last_rank(watcher: Watcher, seconds: float) -> None:
    """Write that all others have ended, and this rank's stacks: it may hang after its work."""
    phase, step, _ = watcher.position
    _write_stderr(
        f"txcore: rank {watcher.rank} is the last of {watcher.world}: the others finished "
        f"{seconds:.0f} s ago, and it is at step {step} ({phase}), here:\n{format_stacks()}"
    )


def format_stacks() -> str:
    """Return the stacks of the program's threads, without reading files, which might block."""
    frames = sys._current_frames()
    rows = []
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        if frame is None or thread.name.startswith(OWN_THREADS):
            continue
        rows.append(f"Thread {thread.name} (most recent call first):")
        for _ in range(DEEPEST):
            code = frame.f_code
            rows.append(f'  File "{code.co_filename}", line {frame.f_lineno} in {code.co_name}')
            if frame.f_back is None:
                break
            frame = frame.f_back
    return "\n".join(rows) + "\n"


def wait_until(watcher: Watcher, there: Callable[[], bool], seconds: float) -> bool:
    """Wait until a condition holds or the time is over; tell whether it holds."""
    deadline = time.monotonic() + seconds
    while not there() and time.monotonic() < deadline and not watcher.closed:
        time.sleep(0.005)
    return there()


def _end_anyway(code: int) -> None:
    time.sleep(AT_MOST_S)
    os._exit(code)


def _flush_streams() -> None:
    """Write out what was printed: os._exit does not."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):  # none, broken or closed
            continue


def _write_stderr(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, text.encode(errors="replace"))
