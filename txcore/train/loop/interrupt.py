"""Handle SIGTERM and SIGINT during training: all ranks stop between the same two steps."""

import signal
import threading
from collections.abc import Callable
from signal import Signals
from types import FrameType
from typing import Any, NoReturn

import jax

from txcore.launch import watch

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
    """Hold the signal that asked the run to stop.

    Attributes:
      asked: the signal that this process received; None until it receives one.
      stopped: the signal that stops the run, on whichever rank it came; None until then.
      wake: called at a signal, for who waits for a batch; it may interrupt anything.
    """

    def __init__(self) -> None:
        self.asked: Signals | None = None
        self.stopped: Signals | None = None
        self.wake: Callable[[], None] = lambda: None
        self._alone = jax.process_count() == 1
        self._sigint = False  # whether one came
        self._held = self._hurry = False  # a second one waits; it came meanwhile

    def ask(self, number: int) -> None:
        """Note a signal (from its handler).

        Raises:
          KeyboardInterrupt: at a second SIGINT.
        """
        if number == signal.SIGINT:
            if self._sigint and not self._held:
                raise KeyboardInterrupt
            self._hurry = self._sigint
            self._sigint = True
        self.asked = self.asked or Signals(number)
        self.wake()
        if jax.process_count() > 1:
            watch.request_stop(self.asked.name)

    def hold(self) -> None:
        """Keep a second SIGINT waiting until `release`.

        A step consumes one state and returns another: between the two there is none to save.
        """
        self._held = True

    def release(self) -> None:
        """Let a second SIGINT end the program at once again.

        Raises:
          KeyboardInterrupt: a second SIGINT came meanwhile.
        """
        self._held = False
        if self._hurry:
            raise KeyboardInterrupt

    def is_due(self, step: int) -> bool:
        """Tell whether to stop before a step, at the same one on every rank."""
        if self._alone:
            self.stopped = self.asked
        elif watch.reach(step):
            name = (watch.stop_reason() or "").partition(" ")[0]  # of "SIGTERM on rank 1"
            self.stopped = Signals.__members__.get(name, Signals.SIGTERM)
        return self.stopped is not None

    def end(self) -> NoReturn:
        """End the program as the signal would have, by an exception.

        Raises:
          KeyboardInterrupt: after SIGINT.
          SystemExit: after SIGTERM, with exit code 143, which schedulers recognize.
        """
        if self.stopped is None or self.stopped == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.stopped)


class interrupts:
    """Note the first SIGTERM or SIGINT instead of ending at once; a second SIGINT ends the program.

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
