"""Compare what the ranks of a run are about to train on, before any of them begins."""

import argparse
import hashlib

from data.dataset import Dataset

from txcore import launch
from txcore.launch import preflight

# Where a rank is and what it writes: none of it decides what is computed.
OWN = frozenset(
    {"coordinator", "num_processes", "process_id", "data_dir"}
    | {"log_dir", "log_formats", "results", "plot"}
)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse arguments that differ between the ranks, each by its flag.

    Args:
      args: what `cli.parse` returns.

    Raises:
      launch.MismatchError: they differ; every rank raises it alike.
    """
    preflight.check("the arguments", facts_of_arguments(args))


def facts_of_arguments(args: argparse.Namespace) -> dict[str, str]:
    """Return the arguments that decide what is computed, by flag.

    Example:
      >>> facts_of_arguments(argparse.Namespace(train_size=100, results="of-rank-1.json"))
      {'--train-size': '100'}
    """
    return {
        f"--{name.replace('_', '-')}": "not given" if value is None else str(value)
        for name, value in vars(args).items()
        if name not in OWN
    }


def check_data(data: Dataset) -> None:
    """Refuse data that differ between the ranks: each takes its part of one global order.

    Args:
      data: what this rank has loaded.

    Raises:
      launch.MismatchError: they differ; every rank raises it alike.
    """
    if launch.world_size() > 1:
        preflight.check("the data", facts_of_data(data))


def facts_of_data(data: Dataset) -> dict[str, str]:
    """Return name, size and digest of a data set.

    Example:
      >>> import numpy as np
      >>> images, labels = np.zeros((2, 28, 28, 1), np.float32), np.arange(2, dtype=np.int32)
      >>> facts = facts_of_data(Dataset("tiny", images, labels, images, labels))
      >>> facts["data set"], facts["test examples"][:10]
      ('tiny', '2, sha256 ')
    """
    facts = {"data set": data.name}
    for part, images, labels in (
        ("training", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    ):
        digest = hashlib.sha256(images)  # hashed as the model sees them, whatever file they are of
        digest.update(labels)
        facts[f"{part} examples"] = f"{len(labels)}, sha256 {digest.hexdigest()[:12]}"
    return facts
