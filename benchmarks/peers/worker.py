"""What every worker does alike: read its arguments, load its share, run steps when told to.

A worker imports one framework and lives as long as its standard input is open. Each line there
asks for a number of steps; the answer is one line of JSON with their time and losses. The harness
has pinned the process to its cores and set the number of threads before it started.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import numpy as np

LEARNING_RATE, MOMENTUM = 0.02, 0.9


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a worker's command line."""
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--weights", required=True, help="npz file of the initial weights, as txcore names them")
    add("--data", required=True, help="npz file of the global batches")
    add("--processes", type=int, required=True)
    add("--devices", type=int, required=True, help="in each process")
    add("--rank", type=int, required=True)
    add("--ports", required=True, help="one free port for each process, separated by commas")
    add("--answers", type=int, required=True, help="file descriptor to write the answers to")
    add("--precision", default="float32")
    add("--form", default="best")
    args = parser.parse_args(argv)
    args.ports = [int(port) for port in args.ports.split(",")]
    return args


def load_weights(path: str) -> dict[str, np.ndarray]:
    """Return {"conv0/w": [h, w, in, out], "conv0/b": [out], ...}, in the order of the layers."""
    with np.load(path) as arrays:
        return dict(arrays)


def load_batches(args: argparse.Namespace) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return this process's part of each global batch: images [b, 28, 28, 1], labels [b]."""
    with np.load(args.data) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    size = images.shape[1] // args.processes
    rows = slice(args.rank * size, (args.rank + 1) * size)
    return [
        (image[rows].copy(), label[rows].copy())
        for image, label in zip(images, labels, strict=True)
    ]


def serve_requests(
    args: argparse.Namespace,
    step: Callable[[Any], Any],
    batches: Sequence[Any],
    versions: dict[str, str],
    to_float: Callable[[Any], float] = float,
    ahead: int | None = None,
) -> None:
    """Run steps over the batches, again and again, as standard input asks for them.

    Args:
      args: of the command line.
      step: trains on one batch and returns its loss, which may still be under way.
      batches: in the framework's own arrays, in memory.
      versions: of the framework, reported once.
      to_float: waits for a loss and returns this process's mean.
      ahead: how many steps may be under way besides the one that is waited for; None for all.
    """
    answers = os.fdopen(args.answers, "w", encoding="utf-8")
    _send_line(answers, {"versions": versions | {"python": sys.version.split()[0]}})
    feed = itertools.cycle(batches)
    for line in sys.stdin:
        count = json.loads(line)["steps"]
        started = time.perf_counter()
        losses = read_losses(map(step, itertools.islice(feed, count)), to_float, ahead)
        seconds = time.perf_counter() - started
        _send_line(answers, {"seconds": seconds, "losses": losses})


def read_losses(
    pending: Iterator[Any], to_float: Callable[[Any], float], ahead: int | None
) -> list[float]:
    """Start one step after the other, and wait for each once `ahead` more have been started."""
    waiting: deque[Any] = deque()
    losses = []
    for loss in pending:
        waiting.append(loss)
        if ahead is not None and len(waiting) > ahead:
            losses.append(to_float(waiting.popleft()))
    return losses + [to_float(loss) for loss in waiting]


def _send_line(answers: IO[str], record: dict[str, Any]) -> None:
    answers.write(json.dumps(record) + "\n")
    answers.flush()
