"""Check the arguments of `fit`: how long to train, and what to do every so many steps."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from txcore.kernels.common.checks import whole_number
from txcore.train.checkpoints import folder
from txcore.train.checkpoints.checkpoints import Checkpoints
from txcore.train.checkpoints.manifest import CheckpointError, Position
from txcore.train.loggers import Metrics
from txcore.train.replicas import agreement
from txcore.train.state.state import TrainState

Evaluate = Callable[[TrainState], Metrics]

_LOG = logging.getLogger("txcore")


@dataclass(frozen=True)
class Length:
    """Hold the length of a run in steps or in epochs, counted from the run's beginning."""

    steps: int | None
    epochs: int | None

    @classmethod
    def of_arguments(cls, steps: Any, epochs: Any) -> "Length":
        """Return the length that `fit` was given, or refuse it."""
        if (steps is None) == (epochs is None):
            raise ValueError(f"fit needs one of steps= and epochs=, got {steps=} and {epochs=}")
        given = steps if steps is not None else epochs
        number = whole_number(given)
        if number is None or number < 0:
            raise ValueError(f"fit needs steps= or epochs= a count from 0 on, got {given!r}")
        return cls(number, None) if steps is not None else cls(None, number)

    def count_steps(self, data: Any, at: Position) -> int | None:
        """Return the number of steps from a position in the data to the end; None if unknown."""
        if self.epochs is None:
            return self.steps
        number = agreement.count_batches(data)
        if number is None:
            return None
        return at.steps - at.batch + (self.epochs - at.epoch) * number


def check_evaluation(
    evaluate: Evaluate | None, eval_every: Any, checkpoints: Checkpoints | None
) -> int | None:
    """Return `eval_every`; refuse a wrong one, and arguments that do not fit it."""
    every = whole_number(eval_every)
    if eval_every is not None and (every is None or every < 1 or evaluate is None):
        raise ValueError(
            f"fit needs eval_every= at least 1 and evaluate= with it, got {eval_every=}"
        )
    if checkpoints is not None and not isinstance(checkpoints, Checkpoints):
        raise TypeError(
            f"fit needs checkpoints= a tx.Checkpoints(folder, every=...), got {checkpoints!r}"
        )
    if checkpoints is not None and checkpoints.keep_best and evaluate is None:
        raise ValueError(
            f"fit needs evaluate= for Checkpoints(keep_best={checkpoints.keep_best}), got none: "
            "give a function that returns that metric"
        )
    return every


def count_steps_made(state: TrainState) -> int:
    """Return the number of steps a state has made, skipped ones included."""
    skipped = 0 if state.loss_scaling is None else int(np.asarray(state.loss_scaling.skipped_steps))
    return int(np.asarray(state.step)) + skipped


def check_rest(made: int, total: int) -> None:
    """Refuse a state that has made more steps than the run is long."""
    more = f"give steps={made + total} for {total} more"
    if made > total:
        raise ValueError(
            f"fit is to make steps={total} in all, and the state has made {made} already: {more}"
        )
    if made == total:
        warn_user("fit has no step to make: of steps=%d the state has made all: %s", total, more)


def check_count(option: str, value: Any) -> int | None:
    """Return a count of steps, or None for None; refuse anything else."""
    number = whole_number(value)
    if value is not None and (number is None or number < 1):
        raise ValueError(f"fit needs {option}= a count of steps from 1 on, got {value!r}")
    return number


def check_prefetch(value: Any) -> int:
    """Return how many batches to read ahead; refuse anything else than a count."""
    number = whole_number(value)
    if number is None or number < 0:
        raise ValueError(
            f"fit needs prefetch= a count of batches, got {value!r}: give 0 to read each batch "
            "when its step is due"
        )
    return number


def check_steps_per_call(value: Any, every: dict[str, int | None]) -> int:
    """Return how many steps there are in one program; refuse a count that does not fit the rest.

    Args:
      value: as given.
      every: what happens after every so many steps, by the argument that says so.
    """
    number = whole_number(value)
    if number is None or number < 1:
        raise ValueError(f"fit needs steps_per_call= a count of steps from 1 on, got {value!r}")
    for name, steps in every.items():
        if steps is not None and steps % number:
            nearest = max(steps // number, 1) * number
            raise ValueError(
                f"fit needs {name}= a multiple of steps_per_call={number}, since nothing comes "
                f"between the steps of one program, got {steps}: give {name}={nearest}, or "
                f"steps_per_call={math.gcd(steps, number)}"
            )
    return number


def check_length(checkpoints: Checkpoints, position: Position, total: int | None) -> None:
    """Refuse to resume a run that is already longer than `fit` is asked to make it."""
    if total is not None and position.steps > total:
        raise CheckpointError(
            f"{checkpoints.directory / folder.checkpoint_name(position.steps)} is after "
            f"{position.steps} steps, but the run is to make {total}: give steps= (or "
            "epochs=) at least as large, or another folder",
            every_rank=True,
        )


def warn_user(text: str, *values: Any) -> None:
    """Log a warning on rank 0."""
    if jax.process_index() == 0:
        _LOG.warning("txcore: " + text, *values)
