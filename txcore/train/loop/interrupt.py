"""SIGTERM and SIGINT during training: noted, and acted upon between two steps, by all ranks."""

import signal
import threading
from signal import Signals
from types import FrameType
from typing import Any, NoReturn

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
        self._held = self._hurry = False  # a second one waits; it came meanwhile

    def ask(self, number: int) -> None:
        """Note a signal (from its handler).

        Raises:
          KeyboardInterrupt: a second SIGINT: somebody is in a hurry.
        """
        if number == signal.SIGINT:
            if self._sigint and not self._held:
                raise KeyboardInterrupt
            self._hurry = self._sigint
            self._sigint = True
        self.asked = self.asked or Signals(number)
        if jax.process_count() > 1:
            watch.request_stop(self.asked.name)

    def hold(self) -> None:
        """Have a second SIGINT wait for `release`.

        For the call of a step, which takes one state and returns another: in between there is none.
        """
        self._held = True

    def release(self) -> None:
        """Let a second SIGINT end at once again.

        Raises:
          KeyboardInterrupt: one came meanwhile.
        """
        self._held = False
        if self._hurry:
            raise KeyboardInterrupt

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


class interrupts:
    """Note the first SIGTERM or SIGINT instead of ending at once; a second SIGINT ends.

    Only the main thread may handle signals; in another one nothing is noted. A signal that is
    ignored (SIGINT by `train.py &` of a script) stays ignored. It is a class, since contextlib sets
    attributes of the exceptions that pass through a generator, and some refuse them.
    """

    def __enter__(self) -> Interrupt:
        interrupt = Interrupt()
        self._before: dict[Signals, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return interrupt

        def note(number: int, frame: FrameType | None) -> None:
            interrupt.ask(number)

        for number in SIGNALS:
            was = signal.getsignal(number)
            if was != signal.SIG_IGN:
                # None: a handler that was not installed from Python, which cannot be put back.
                self._before[number] = signal.SIG_DFL if was is None else was
                signal.signal(number, note)
        return interrupt

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
