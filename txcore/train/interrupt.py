"""SIGTERM and SIGINT during training: noted, and acted upon between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from signal import Signals
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
    """Hold the signal that asked the run to stop, None until there is one."""

    noted: Signals | None = None

    def end(self) -> NoReturn:
        """End the program as the signal would have, by an exception.

        Raises:
          KeyboardInterrupt: after SIGINT.
          SystemExit: after SIGTERM, with exit code 143, which schedulers know.
        """
        if self.noted is None or self.noted == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.noted)


@contextmanager
def interrupts() -> Iterator[Interrupt]:
    """Note the first SIGTERM or SIGINT instead of ending at once; a second SIGINT ends.

    Only the main thread may handle signals; in another one nothing is noted.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        if interrupt.noted is None:
            interrupt.noted = Signals(number)
        elif number == signal.SIGINT:  # somebody is in a hurry; a scheduler would send SIGKILL
            raise KeyboardInterrupt

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            # None: a handler that was not installed from Python, which cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
