"""Report finished steps to the loggers, with their times."""

import errno
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from txcore import _compat
from txcore.printing import name_of
from txcore.train.checkpoints.manifest import Position
from txcore.train.loggers import Logger, Metrics, Record
from txcore.train.steps.steps import Steps

# How many steps the host may run ahead of the devices: some at least, and of short ones as many as
# hide a pause of the host. Not more, since a signal waits for them, and each holds its batch. A
# simulated device shares the host's cores: what waits there takes time from the step under way.
RUN_AHEAD, MOST_AHEAD, HIDDEN_S = 4, 64, 0.1
RUN_AHEAD_ON_CPU = 1

_ARRAY = _compat.array_type()
_FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk that may have room again

_LOG = logging.getLogger("txcore")


@dataclass
class Progress:
    """Turn the metrics of finished steps into records; time the steps without compilation."""

    runner: Steps
    loggers: Sequence[Logger]
    total_steps: int | None
    start: Position
    check: Callable[[int, Metrics], None]
    pending: deque[tuple[Any, int | tuple[int, ...]]] = field(default_factory=deque)
    _mark: float | None = None  # when the clock was started; None while it is stopped

    def __post_init__(self) -> None:
        self.done, self.seconds = self.start.steps, self.start.seconds
        self.examples = self.start.examples
        self.loggers = self.loggers if jax.process_index() == 0 else ()
        self._on_cpu = self.runner.options.mesh.devices[0].platform == "cpu"
        self.run_ahead = RUN_AHEAD_ON_CPU if self._on_cpu else RUN_AHEAD
        self.since = (self.start.steps, self.start.seconds, self.start.examples)
        # By the loggers' places, since they may be equal or have no hash.
        self._full, self._left_out = set[int](), set[int]()

    def position(self, reached: Position) -> Position:
        """Return a position with the time and the examples so far."""
        return replace(reached, seconds=self.seconds, examples=self.examples)

    def start_clock(self) -> None:
        """Start the clock, if it is stopped."""
        if self._mark is None:
            self._mark = self._now()

    def _now(self) -> float:
        return time.perf_counter() - self.runner.compile_seconds

    def stop_clock(self) -> None:
        """Wait for the dispatched steps, and stop the clock."""
        while self.pending:
            self._finish_one()
        self._mark = None

    def add(self, metrics: Any, examples: int | tuple[int, ...]) -> None:
        """Note a dispatched step, or several of one program; wait for older ones if too many run.

        Args:
          metrics: of the step; of several they are stacked.
          examples: of the step without padding, or of each of several.
        """
        self.pending.append((metrics, examples))
        while len(self.pending) > self.run_ahead:
            self._finish_one()

    def _finish_one(self) -> None:
        metrics, examples = self.pending.popleft()
        host = to_host(metrics)
        now = self._now()
        elapsed = now - self._mark if self._mark is not None else 0.0
        self._mark = now if self._mark is not None else None
        if not isinstance(examples, tuple):
            self._finish_step(host, elapsed, examples)
        else:
            for i, count in enumerate(examples):
                own = jax.tree.map(partial(_read_step, i), metrics)
                self._finish_step(to_host(own), elapsed / len(examples), count)
        if not self._on_cpu:
            self.run_ahead = self._count_ahead()

    def _finish_step(self, metrics: Metrics, seconds: float, examples: int) -> None:
        self.done += 1
        self.seconds += seconds
        self.examples += examples
        if self.loggers:
            self.tell("step", metrics)
        self.check(self.done, metrics)

    def _count_ahead(self) -> int:
        """Return how many steps may run ahead at the pace so far."""
        made, seconds = self.done - self.since[0], self.seconds - self.since[1]
        return min(max(RUN_AHEAD, int(HIDDEN_S * made / max(seconds, 1e-9))), MOST_AHEAD)

    def tell(self, kind: str, metrics: Metrics) -> None:
        """Send a record to the loggers."""
        record = Record(
            kind,
            self.done,
            self.total_steps,
            metrics,
            self.seconds,
            self.examples,
            self.runner.compile_seconds,
            self.since,
        )
        for i, logger in enumerate(self.loggers):
            if i not in self._left_out:
                self._call(i, logger, record)

    def _call(self, i: int, logger: Logger, record: Record) -> None:
        try:
            logger(record)
        except Exception as error:  # a logger that fails must not end a run of days
            full = isinstance(error, OSError) and error.errno in _FULL
            if i not in self._full:
                then = "called again for the next record" if full else "left out from now on"
                _LOG.warning(
                    "txcore: the logger %s failed at step %d, and is %s: %s: %s",
                    *(name_of(logger), self.done, then, type(error).__name__, error),
                )
            (self._full if full else self._left_out).add(i)
        else:
            if self._full:
                self._full.discard(i)


def _read_step(i: int, stacked: jax.Array) -> np.ndarray:
    return np.asarray(stacked)[i]


def to_host(metrics: Any) -> Metrics:
    """Return metrics as Python floats (lists for arrays), waiting for the devices."""
    if type(metrics) is dict and set(map(type, metrics.values())) == {_ARRAY}:  # as most are
        return {name: np.asarray(value).tolist() for name, value in metrics.items()}
    return jax.tree.map(lambda value: np.asarray(value).tolist(), metrics)
