"""SIGTERM and SIGINT during training: noted, and acted upon between two steps, by all ranks."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from signal import Signals
from types import FrameType
from typing import NoReturn

import jax

from txcore.launch import watch

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
    """Hold the signal that asked the run to stop.

    Attributes:
      asked: what this process got, None until there is one.
      stopped: by what the run stops, on whichever rank it came; None until it does.
    """

    def __init__(self) -> None:
        self.asked: Signals | None = None
        self.stopped: Signals | None = None
        self._sigint = False  # whether one came

    def ask(self, number: int) -> None:
        """Note a signal (from its handler).

        Raises:
          KeyboardInterrupt: a second SIGINT: somebody is in a hurry.
        """
        if number == signal.SIGINT:
            if self._sigint:
                raise KeyboardInterrupt
            self._sigint = True
        self.asked = self.asked or Signals(number)
        if jax.process_count() > 1:
            watch.request_stop(self.asked.name)

    def due(self, step: int) -> bool:
        """Tell whether to stop before a step, at the same one on every rank."""
        if jax.process_count() == 1:
            self.stopped = self.asked
        elif watch.reach(step):
            name = (watch.stop_reason() or "").partition(" ")[0]  # of "SIGTERM on rank 1"
            self.stopped = Signals.__members__.get(name, Signals.SIGTERM)
        return self.stopped is not None

    def end(self) -> NoReturn:
        """End the program as the signal would have, by an exception.

        Raises:
          KeyboardInterrupt: after SIGINT.
          SystemExit: after SIGTERM, with exit code 143, which schedulers know.
        """
        if self.stopped is None or self.stopped == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.stopped)


@contextmanager
def interrupts() -> Iterator[Interrupt]:
    """Note the first SIGTERM or SIGINT instead of ending at once; a second SIGINT ends.

    Only the main thread may handle signals; in another one nothing is noted. A signal that is
    ignored (SIGINT by `train.py &` of a script) stays ignored.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def note(number: int, frame: FrameType | None) -> None:
        interrupt.ask(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: was for number, was in before.items() if was != signal.SIG_IGN}
    for number in before:
        signal.signal(number, note)
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            # None: a handler that was not installed from Python, which cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
