"""Time to an accuracy: from the start of the processes, by the harness's clock.

Imports, loading, compilation and the evaluation after each epoch are all in it. A trainer is
any program that prints "test_accuracy" and a number after each epoch.
"""

import contextlib
import dataclasses
import random
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pool import EXAMPLE, HERE, PeerError, divide_cores, free_ports, start_worker, time_limit

TRAIN = EXAMPLE / "train.py"
# As examples/mnist/train.py and torch_train.py print it.
ACCURACY = re.compile(r'test_accuracy"?:? +(\d\.\d+)')
SECONDS = 1800.0  # for one run


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How both frameworks train: SGD with momentum 0.9, batch 64 in each worker.

    Attributes:
      learning_rate: the peak, after the warm-up.
      warmup: steps of linear warm-up.
      label_smoothing: the weight of the uniform distribution in the labels'.
      epochs: over which the rate falls to 0, by half a cosine; training ends there.
    """

    learning_rate: float
    warmup: int
    label_smoothing: float
    epochs: int


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A program that trains to the end.

    Attributes:
      name: as reported.
      own: whether it runs in the project's own environment.
      processes: how many run it.
      epochs: at most.
      command: (rank, port, seed) -> the arguments after the interpreter.
    """

    name: str
    own: bool
    processes: int
    epochs: int
    command: Callable[[int, int, int], list[str]]


@dataclasses.dataclass(frozen=True)
class Run:
    """One training; `seconds` is None where the goal was not reached."""

    seed: int
    seconds: float | None
    accuracies: list[float]


def flags_of(given: Mapping[str, Any]) -> list[str]:
    """Return what is given as a program's flags."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


def txcore_trainer(processes: int, recipe: Recipe) -> Trainer:
    """Return the MNIST example on two devices, in one process or in two."""

    def command(rank: int, port: int, seed: int) -> list[str]:
        given = {"model": "cnn3x3", "dropout": 0, "devices": 2, "dataset": "mnist"}
        given |= {"seed": seed, "decay": "cosine"}
        if processes > 1:
            given["coordinator"] = f"127.0.0.1:{port}"
            given |= {"num-processes": processes, "process-id": rank}
        return [str(TRAIN), *flags_of(given | dataclasses.asdict(recipe)), "--no-audit"]

    where = "2 devices" if processes == 1 else f"{processes} processes"
    return Trainer(f"txcore ({where})", True, processes, recipe.epochs, command)


def torch_trainer(name: str, epochs: int, recipe: dict[str, Any]) -> Trainer:
    """Return PyTorch DDP in its best form, by a recipe as torch_train.py takes it."""

    def command(rank: int, port: int, seed: int) -> list[str]:
        given = {"seed": seed, "rank": rank, "processes": 2, "port": port}
        return [str(HERE / "torch_train.py"), *flags_of(given | recipe)]

    return Trainer(name, False, 2, epochs, command)


def list_trainers(recipe: Recipe, max_epochs: int) -> list[Trainer]:
    """Return all: by txcore's recipe, and DDP by its own too, for at most so many epochs."""
    own = {"optimizer": "adadelta", "epochs": max_epochs}
    same = {"optimizer": "sgd", **dataclasses.asdict(recipe)}
    return [
        txcore_trainer(1, recipe),
        txcore_trainer(2, recipe),
        torch_trainer("PyTorch DDP (its example's recipe)", max_epochs, own),
        torch_trainer("PyTorch DDP (txcore's recipe)", recipe.epochs, same),
    ]


def run_one(
    trainer: Trainer,
    *,
    goal: float,
    seed: int,
    pythons: Mapping[bool, str],
    cores: Sequence[int],
) -> Run:
    """Train until the goal is reached, or for all epochs.

    Args:
      trainer: what to run.
      goal: test accuracy, 0 to 1.
      seed: of the run.
      pythons: the interpreters of the project's own environment (True) and the peers' (False).
      cores: one for each worker.

    Returns:
      When it was reached, and the accuracy after each epoch.

    Raises:
      PeerError: the program ended before, or ran for too long.
    """
    (port,) = free_ports(1)
    workers: list[subprocess.Popen[str]] = []
    accuracies: list[float] = []
    with contextlib.ExitStack() as stack:
        errors = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
        started = time.perf_counter()
        for rank, share in enumerate(divide_cores(cores, trainer.processes)):
            command = [pythons[trainer.own], *trainer.command(rank, port, seed)]
            out = subprocess.DEVNULL if rank else subprocess.PIPE
            workers.append(start_worker(command, share, stdout=out, stderr=errors))
            stack.enter_context(workers[-1])
            stack.callback(workers[-1].kill)
        stack.enter_context(time_limit(workers, SECONDS))
        assert workers[0].stdout is not None
        for line in workers[0].stdout:
            found = ACCURACY.search(line)
            if found and len(accuracies) < trainer.epochs:
                accuracies.append(float(found[1]))
                if accuracies[-1] >= goal:
                    return Run(seed, time.perf_counter() - started, accuracies)
        if len(accuracies) < trainer.epochs:
            errors.seek(0)
            raise PeerError(
                f"{trainer.name}: ended or was ended after {len(accuracies)} of {trainer.epochs} "
                f"epochs; its standard error ends with:\n{errors.read()[-2000:].strip()}"
            )
    return Run(seed, None, accuracies)


def measure_accuracy(
    chosen: Sequence[Trainer],
    *,
    seeds: int,
    say: Callable[[str], None],
    **options: Any,
) -> dict[str, list[Run]]:
    """Run every trainer once for each seed, in a shuffled order; options as for `run_one`."""
    runs: dict[str, list[Run]] = {each.name: [] for each in chosen}
    order = random.Random(0)
    for seed in range(seeds):
        for each in order.sample(chosen, len(chosen)):
            run = run_one(each, seed=seed, **options)
            runs[each.name].append(run)
            reached = "not reached" if run.seconds is None else f"{run.seconds:.1f} s"
            say(f"seed {seed}, {each.name}: {reached} after {len(run.accuracies)} epochs")
    return runs


def load_data(python: str) -> None:
    """Make sure that MNIST is there, so that no run has the download in its time.

    Raises:
      PeerError: it cannot be had.
    """
    script = TRAIN.with_name("download.py")
    done = subprocess.run([python, str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerError(f"no MNIST: {done.stderr.strip()}")
