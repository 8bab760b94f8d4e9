"""Load MNIST, or where it cannot be had, scikit-learn's handwritten digits."""

import dataclasses
import itertools
import os
import pathlib
import sys
from collections.abc import Callable, Mapping

import numpy as np

from data import download
from data.files import NAMES as FILE_NAMES
from data.files import NPZ, locate
from data.idx import DataError, data_error, read_images, read_labels
from data.npz import read_npz

NAMES = ("auto", "mnist", "digits")
SIDE = 28  # pixels
CLASSES = 10
# Mean and standard deviation of the training pixels in 0..1.
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081
DIGITS_MEAN, DIGITS_STD = 0.3054, 0.3238
DIGITS_TEST = 360
_FAILED = "failed: "


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels to train and to test on.

    Attributes:
      name: "mnist" or "digits".
      train_images: float32 [n, 28, 28, 1]; standardised, (pixel in 0..1 - mean) / std.
      train_labels: int32 [n], 0 to 9.
      test_images: float32 [m, 28, 28, 1].
      test_labels: int32 [m].
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(
    name: str = "auto",
    data_dir: str | os.PathLike[str] | None = None,
    *,
    rank: int = 0,
    barrier: Callable[[str], object] = lambda name: None,
    agree: Callable[[str], str] = lambda own: own,
) -> Dataset:
    """Load a data set, the same one on every rank.

    Every rank calls `barrier` and then `agree` once (`barrier` not for "digits"), whatever
    fails, so that no rank waits in them for ever; and where rank 0 fails, all do. A rank that
    alone cannot read the files (on its own disk) raises, and its launcher ends the others.

    Args:
      name: "mnist" takes the files in the folder and downloads those that are not there;
        "digits" takes scikit-learn's, without a network; "auto" takes MNIST, and the digits
        where there is no MNIST file and no download: one line on stderr says so.
      data_dir: the folder of the MNIST files, under any of their usual names (`files.locate`), or
        Keras' mnist.npz; None takes the environment variable TXCORE_DATA,
        and where that is not set, data/mnist under the current folder. Its files are checked
        for their format, not their checksum.
      rank: of this process. Rank 0 alone downloads.
      barrier: called with a name; returns when all ranks have called it.
      agree: returns on every rank the text that rank 0 gave.

    Returns:
      The data set.

    Raises:
      ValueError: there is no data set `name`.
      DataError: the data cannot be had, or the files are damaged or do not fit together.

    Example:
      >>> data = load("digits")
      >>> data.train_images.shape, data.test_images.shape
      ((1437, 28, 28, 1), (360, 28, 28, 1))
    """
    if name not in NAMES:
        raise ValueError(f"dataset: required one of {', '.join(NAMES)}, given {name!r}; pass one")
    folder = download.data_folder(data_dir)
    data, failure = None, None
    try:
        data = _read(_choose(name, folder, rank, barrier), folder)
    except Exception as error:  # held back, since the other ranks wait in `agree`
        failure = error
    own = data.name if data else f"{_FAILED}{failure}"
    agreed = agree(own)
    if failure is not None and (rank == 0 or agreed == own):
        raise failure
    if agreed.startswith(_FAILED):
        raise DataError(f"rank 0 has no data: {agreed.removeprefix(_FAILED)}")
    return data if data and data.name == agreed else _read(agreed, folder)


def _choose(name: str, folder: pathlib.Path, rank: int, barrier: Callable[[str], object]) -> str:
    """Return the data set to read, after the download where it needs one."""
    if name == "digits":
        return name
    try:
        download.ensure(folder, rank=rank, barrier=barrier)
    except DataError as error:
        if name == "mnist" or _holds_data(folder):
            raise
        if rank == 0:
            print(
                f"no MNIST, so this uses scikit-learn's 8x8 digits instead ({error})",
                file=sys.stderr,
            )
        return "digits"
    return "mnist"


def _holds_data(folder: pathlib.Path) -> bool:
    """Tell whether a folder holds a data set, or what may be one: it is not passed over."""
    try:
        return bool(locate(folder))
    except DataError:
        return True


def _read(name: str, folder: pathlib.Path) -> Dataset:
    return _read_digits() if name == "digits" else _read_mnist(folder)


def _read_mnist(folder: pathlib.Path) -> Dataset:
    found = locate(folder)
    if NPZ in found:
        path, arrays = found[NPZ], read_npz(found[NPZ])
        pairs = (
            _prepare(arrays.pop(x), arrays[y], f"{path}:{x}", f"{path}:{y}")  # freed once used
            for x, y in (("x_train", "y_train"), ("x_test", "y_test"))
        )
        return Dataset("mnist", *itertools.chain(*pairs))
    paths = [_file(folder, found, name) for name in FILE_NAMES]
    pairs = (
        _prepare(read_images(images), read_labels(labels), str(images), str(labels))
        for images, labels in (paths[:2], paths[2:])
    )
    return Dataset("mnist", *itertools.chain(*pairs))


def _file(folder: pathlib.Path, found: Mapping[str, pathlib.Path], name: str) -> pathlib.Path:
    if name not in found:
        raise data_error(
            folder,
            f"{name}.gz or {name}",
            "neither",
            f"run `python examples/mnist/download.py --data-dir {folder}`",
        )
    return found[name]


def _prepare(
    pixels: np.ndarray, labels: np.ndarray, images_path: str, labels_path: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return images and labels of a file, checked, as the model takes them."""
    _check_labels(labels_path, labels)
    if pixels.shape[1:] != (SIDE, SIDE):
        rows, cols = pixels.shape[1:]
        raise data_error(
            images_path,
            f"images of {SIDE}x{SIDE} pixels",
            f"{rows}x{cols}",
            "give a folder with the files of MNIST or of a set made like it",
        )
    if len(pixels) != len(labels):
        raise data_error(
            images_path,
            f"one image for each of the {len(labels)} labels in {pathlib.Path(labels_path).name}",
            f"{len(pixels)} images",
            "take both files from the same source",
        )
    return _standardise(pixels, MNIST_MEAN, MNIST_STD), labels.astype(np.int32)


def _check_labels(path: str, labels: np.ndarray) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= CLASSES))
    if len(wrong):
        raise data_error(
            path,
            f"labels of 0 to {CLASSES - 1}",
            f"{labels[wrong[0]]} as label {wrong[0]}",
            "give a folder with the files of MNIST or of a set made like it",
        )


def _standardise(pixels: np.ndarray, mean: float, std: float) -> np.ndarray:
    """Return uint8 pixels [n, 28, 28] as float32 [n, 28, 28, 1], (pixel / 255 - mean) / std."""
    images = pixels.astype(np.float32)
    images /= 255  # in place, since each copy of MNIST is 188 MB
    images -= mean
    images /= std
    return images[..., np.newaxis]


def _read_digits() -> Dataset:
    """Return scikit-learn's digits; the last 360, by other writers, are the test set.

    E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI (1998).
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            f"digits: required scikit-learn, found none ({error}); install txcore[examples], "
            "or name a folder with the MNIST files with --data-dir or TXCORE_DATA"
        ) from None
    digits = load_digits()
    pixels = np.round(_upsample(digits.images, SIDE) * (255 / 16)).astype(np.uint8)
    images = _standardise(pixels, DIGITS_MEAN, DIGITS_STD)
    labels = digits.target.astype(np.int32)
    split = len(labels) - DIGITS_TEST
    return Dataset("digits", images[:split], labels[:split], images[split:], labels[split:])


def _upsample(images: np.ndarray, side: int) -> np.ndarray:
    """Return [n, s, s] images as [n, side, side]: bilinear, the pixels' centres aligned."""
    weights = _bilinear_weights(images.shape[1], side)
    return weights @ images @ weights.T


def _bilinear_weights(few: int, many: int) -> np.ndarray:
    """Return [many, few]: how much of each old pixel each new one takes, along one dim."""
    centres = (np.arange(many) + 0.5) * few / many - 0.5
    distances = np.abs(np.clip(centres, 0, few - 1)[:, np.newaxis] - np.arange(few))
    return np.maximum(0, 1 - distances)
