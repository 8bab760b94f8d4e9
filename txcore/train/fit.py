"""The training loop: feed batches to a step, keep the devices busy, tell the loggers."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from txcore.plan import Plan
from txcore.train.batch import examples
from txcore.train.loggers import Logger, Metrics, Record
from txcore.train.state import TrainState

Data = Iterable[Any] | Callable[[int], Iterable[Any]]
Evaluate = Callable[[TrainState], Metrics]

# How many steps the host may run ahead of the devices: enough to hide its work, few enough not
# to pile up batches. A simulated device shares the host's cores: what waits there takes time from
# the step under way.
RUN_AHEAD, RUN_AHEAD_ON_CPU = 4, 1


def count_steps(data: Data, steps: int | None, epochs: int | None) -> int | None:
    """Check `steps` and `epochs`, and return the number of steps if it is known."""
    if (steps is None) == (epochs is None):
        raise ValueError(f"fit needs one of steps= and epochs=, got {steps=} and {epochs=}")
    given = steps if steps is not None else epochs
    if not isinstance(given, int) or given < 0:
        raise ValueError(f"fit needs steps= or epochs= a count from 0 on, got {given!r}")
    if epochs is not None:
        return epochs * len(data) if isinstance(data, Sized) else None
    return steps


def batches(data: Data, steps: int | None, epochs: int | None) -> Iterator[Any]:
    """Yield the batches of `steps` steps or of `epochs` passes over `data`."""
    done, epoch = 0, 0
    while (epochs is None or epoch < epochs) and done != steps:
        before = done
        for batch in data(epoch) if callable(data) else data:
            if done == steps:
                return
            yield batch
            done += 1
        if done == before:
            raise ValueError(
                f"fit needs data for {steps if steps is not None else 'another'} "
                f"{'steps' if steps is not None else 'epoch'}, but the data ended after {done} "
                "batches: pass a list of batches, or a function epoch -> batches, that can be "
                "read again"
            )
        epoch += 1


@dataclass
class Progress:
    """Turn the metrics of finished steps into records, and time them, compilation left out."""

    loggers: tuple[Logger, ...]
    total_steps: int | None
    compile_seconds: Callable[[], float]
    run_ahead: int = RUN_AHEAD
    pending: deque[tuple[Any, int]] = field(default_factory=deque)
    done: int = 0
    seconds: float = 0.0
    examples: int = 0
    _mark: float | None = None  # when the clock was started; None while it stands

    def start_clock(self) -> None:
        """Count time from now on."""
        self._mark = self._now()

    def _now(self) -> float:
        return time.perf_counter() - self.compile_seconds()

    def stop_clock(self) -> None:
        """Wait for the steps that are under way, and stop counting."""
        while self.pending:
            self._finish_one()
        self._mark = None

    def add(self, metrics: Any, examples: int) -> None:
        """Note a step that was dispatched; wait for an older one if too many are under way."""
        self.pending.append((metrics, examples))
        while len(self.pending) > self.run_ahead:
            self._finish_one()

    def _finish_one(self) -> None:
        metrics, examples = self.pending.popleft()
        host = to_host(metrics)
        now = self._now()
        elapsed = now - self._mark if self._mark is not None else 0.0
        self._mark = now if self._mark is not None else None
        self.done += 1
        self.seconds += elapsed
        self.examples += examples
        self.tell("step", host)

    def tell(self, kind: str, metrics: Metrics) -> None:
        """Send a record to the loggers."""
        record = Record(
            kind,
            self.done,
            self.total_steps,
            metrics,
            self.seconds,
            self.examples,
            self.compile_seconds(),
        )
        for logger in self.loggers:
            logger(record)


def to_host(metrics: Any) -> Metrics:
    """Return metrics as Python floats (lists for arrays), waiting for the devices."""
    return jax.tree.map(lambda value: np.asarray(value).tolist(), metrics)


def real_examples(host: Any, placed: Any, plan: Plan) -> int:
    """Return the real examples of a global batch; `host` is this process's part of it.

    In several processes it is an estimate by this process's mask: throughput needs no
    communication of its own.
    """
    total, mask = examples(placed, plan)[0], examples(host, plan)[1]
    return round(total * float(np.mean(mask != 0))) if isinstance(mask, np.ndarray) else total
