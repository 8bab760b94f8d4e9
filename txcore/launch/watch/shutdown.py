"""How a rank leaves the run: by its own error, by a verdict, or at the end of its program.

Rank 0's process is the coordinator. jax aborts (SIGABRT) whoever is still connected when that goes,
so rank 0 goes last.
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

LONGEST_ERROR = 600  # characters of an error that the other ranks are told
GRACE_S = 2.0  # how long rank 0 stays for the others where the run ends by a verdict
AT_MOST_S = 8.0  # how long ending may take, should stderr be blocked, say
DEEPEST = 60  # frames of a stack that are shown
PATIENCE_S = 5.0  # after how long rank 0 says at its end for whom it waits

# What gloo, NCCL and the coordination service say of a peer that is gone.
_LOST = re.compile(
    r"\b(gloo|nccl)\b|connection (reset|closed|refused|aborted)|socket closed|broken pipe"
    r"|timed out waiting \d+ ?ms|coordination service|^unavailable",
    re.IGNORECASE,
)


def speaks_of_a_lost_peer(error: BaseException) -> bool:
    """Tell whether an error out of a step comes of another rank's end."""
    # jax raises a ValueError or its own kind of RuntimeError, by its version.
    return isinstance(error, (RuntimeError, ValueError)) and bool(_LOST.search(str(error)))


def fail(watcher: Watcher, error: BaseException) -> None:
    """Tell the others of this rank's error, or end with them where another rank is behind it."""
    alike = getattr(error, "every_rank", False)  # all ranks raise it, and may go on
    if not watcher.watches() or watcher.error is not None or alike:
        return
    watcher.error = error
    if speaks_of_a_lost_peer(error):
        watcher.tell(lost=describe(error))
        # Somebody finds out who is lost; then this process ends while it waits here.
        wait(watcher, lambda: False, 3 * watcher.peer_timeout_s + AT_MOST_S)
    watcher.tell(failed=describe(error))
    seconds = 2 * watcher.interval_s + GRACE_S
    if not wait(watcher, lambda: bool(watcher.sent.failed), seconds):
        return
    if watcher.rank == 0:
        wait(watcher, lambda: not watcher.others(), seconds)
    else:
        _disconnect(watcher)  # so that the coordinator may go before this rank's exception is out


def describe(error: BaseException) -> str:
    """Return an error's type and message on one line, cut to what others need to know."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= LONGEST_ERROR else text[: LONGEST_ERROR - 3] + "..."


def close(watcher: Watcher) -> None:
    """Leave the run at the end of the program."""
    if not watcher.watches():
        return
    if watcher.rank != 0:
        _disconnect(watcher)
        return
    watcher.tell(ended=True)
    if watcher.error is None:  # otherwise fail() has waited
        _see_the_others_off(watcher)
    # One that was killed after it had ended looks connected for minutes.
    if watcher.verdict is None and not watcher.others() and not watcher.stop_exchanges():
        _shutdown()
    watcher.stop_threads()


def _disconnect(watcher: Watcher) -> None:
    watcher.leaving = True
    watcher.tell(ended=True)
    if wait(watcher, lambda: watcher.sent.ended, watcher.interval_s + GRACE_S):
        # Rank 0 goes once this is disconnected. A thread that still asked it something then would
        # wait, and come back into a Python that has ended: abort.
        watcher.stop_exchanges()
        _shutdown()
    watcher.stop_threads()


def _shutdown() -> None:
    import jax

    jax.distributed.shutdown()


def _see_the_others_off(watcher: Watcher) -> None:
    """Wait until every other rank has ended, by itself or by a verdict."""

    def gone() -> bool:
        others = watcher.others()
        return not others or (watcher.verdict is not None and others <= watcher.silent_ranks())

    if not wait(watcher, gone, PATIENCE_S) and watcher.others():
        have = "has" if len(watcher.others()) == 1 else "have"
        _write(
            "txcore: rank 0 has finished, and stays as the coordinator until "
            f"{rank_names(watcher.others())} {have} finished too"
            f"{last_seen(watcher.others(), watcher.table)}\n"
        )
    wait(watcher, gone, float("inf"))


def end(watcher: Watcher, verdict: Verdict, exit_: Callable[[int], object] = os._exit) -> None:
    """Say why this rank ends, show where it stands, and end the process."""
    name = f"{OWN_THREADS}end-anyway"
    with contextlib.suppress(RuntimeError):  # Python is ending, and lets no thread start
        threading.Thread(target=_end_anyway, args=(verdict.code,), daemon=True, name=name).start()
    _flush()
    say(watcher, verdict)
    if watcher.error is not None:
        _write("".join(traceback.format_exception(watcher.error)))
    _write(stacks())
    if watcher.coordinator_lost:  # nobody to say goodbye to, and jax is about to abort
        exit_(verdict.code)
    watcher.tell(ended=True)
    wait(watcher, lambda: watcher.sent.ended, GRACE_S / 2)
    if watcher.rank == 0:
        seconds = GRACE_S + 2 * watcher.interval_s
        wait(watcher, lambda: watcher.others() <= watcher.silent_ranks(), seconds)
        time.sleep(GRACE_S / 8)  # from saying goodbye to having gone
    exit_(verdict.code)


def say(watcher: Watcher, verdict: Verdict) -> None:
    """Write the verdict, and what this rank was in, as one piece to stderr."""
    phase, step, label = watcher.position
    text = f"txcore: rank {watcher.rank} ends at step {step} ({phase}): {verdict.text}"
    if seconds := watcher.stood_still_s():
        text += f" (this rank itself had stood still for {seconds:.0f} s)"
    if label:
        text += f"\ntxcore: rank {watcher.rank} was in {label}"
    _write(text + "\n")


def say_last(watcher: Watcher, seconds: float) -> None:
    """Write that all others have ended, and what this rank is in: it may hang after its work."""
    phase, step, _ = watcher.position
    _write(
        f"txcore: rank {watcher.rank} is the last of {watcher.world}: the others finished "
        f"{seconds:.0f} s ago, and it is at step {step} ({phase}), here:\n{stacks()}"
    )


def stacks() -> str:
    """Return where the program's threads are, without reading a file: that might block too."""
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


def wait(watcher: Watcher, there: Callable[[], bool], seconds: float) -> bool:
    """Wait until something is so, for so long at most; tell whether it is."""
    deadline = time.monotonic() + seconds
    while not there() and time.monotonic() < deadline and not watcher.closed:
        time.sleep(0.005)
    return there()


def _end_anyway(code: int) -> None:
    time.sleep(AT_MOST_S)
    os._exit(code)


def _flush() -> None:
    """Write out what was printed: os._exit does not."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):  # none, broken or closed
            continue


def _write(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, text.encode(errors="replace"))
