"""Watch over work that may never return: what waits in C++ cannot be woken."""

import threading
import time
from collections.abc import Callable
from typing import Self


class Watchdog:
    """Call a function from another thread where one piece of work takes too long.

    Args:
      limit_s: seconds that a piece of work may take.
      on_hang: called with the name of the work that does not end; it may end the process.

    Example:
      >>> from txcore.doctor import Watchdog
      >>> with Watchdog(60, print) as watchdog:
      ...     watchdog.begin("a sum")
    """

    def __init__(self, limit_s: float, on_hang: Callable[[str], None]) -> None:
        self._limit_s, self._on_hang = limit_s, on_hang
        self._work, self._began = "the start", time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def begin(self, work: str) -> None:
        """Begin the next piece of work, whose time counts from now."""
        self._began, self._work = time.monotonic(), work

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._limit_s / 4)):
            if time.monotonic() - self._began > self._limit_s:
                self._on_hang(self._work)
                return

    def __enter__(self) -> Self:
        self.begin(self._work)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
