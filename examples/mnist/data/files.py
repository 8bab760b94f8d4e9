"""Find the files of MNIST in a folder, by the names under which they are handed on."""

import itertools
import os
import pathlib
import re
from collections.abc import Iterable

from data.idx import DataError, data_error

NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
NPZ = "mnist.npz"  # Keras' file of all four
# "train-images-idx3-ubyte", "train-images.idx3-ubyte", "train_images_idx3_ubyte" ..., gzip or not.
_IDX = re.compile(r"(train|t10k|test)[-_.](images[-_.]idx3|labels[-_.]idx1)[-_.]ubyte(?:\.gz)?")
# What may be a data set in a form that is not read here.
_DATA = {"npz", "npy", "pt", "pth", "csv", "parquet", "arrow", "pkl", "pickle", "mat", "h5"}
_DATA |= {"hdf5", "tfrecord", "zip", "tar", "tgz", "png", "jpg", "jpeg", "bmp"}
_MOST_FILES = 10_000


def locate(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Return the files of MNIST in a folder, whatever they are called there.

    The folder itself counts first, then its MNIST/raw (torchvision), then all folders in it, each
    file once. Of a gzip and a plain file of one name the gzip one is taken.

    Args:
      folder: where to look; or Keras' file itself.

    Returns:
      The path of each of NAMES that is there, or {NPZ: path}; {} where there is nothing.

    Raises:
      DataError: a file is there twice, or nothing but data in a form that is not read here.

    Example:
      >>> import tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> (folder / "train-images.idx3-ubyte").touch()
      >>> {name: path.name for name, path in locate(folder).items()}
      {'train-images-idx3-ubyte': 'train-images.idx3-ubyte'}
    """
    if folder.is_file():
        return {NPZ: _checked_npz(folder)}
    nested = _files_in(folder)
    for place in (folder, folder / "MNIST" / "raw"):
        if found := _by_name(folder, (path for path in nested if path.parent == place)):
            return found
    if found := _by_name(folder, nested):
        return found
    others = [path for path in nested if _may_be_data(path.name)]
    if others:
        raise data_error(
            folder,
            f"the four files of MNIST or {NPZ}",
            f"{others[0].relative_to(folder)}, which is not read here",
            "put the four files there, or name an empty folder to download them to",
        )
    return {}


def _checked_npz(path: pathlib.Path) -> pathlib.Path:
    if path.suffix.lower() != ".npz":
        raise data_error(
            path, f"a folder, or a file like {NPZ}", "another file", "name the folder that it is in"
        )
    return path


def _files_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the files in a folder and in those within it, each folder once, links followed."""
    files: list[pathlib.Path] = []
    folders, seen = [folder] if folder.is_dir() else [], set()
    while folders:
        here = folders.pop()
        which = os.stat(here)
        if (which.st_dev, which.st_ino) in seen:
            continue
        seen.add((which.st_dev, which.st_ino))
        for path in _entries(here):
            if path.name.startswith("."):  # among them the parts of our own downloads
                continue
            (folders if path.is_dir() else files).append(path)
        if len(files) + len(folders) > _MOST_FILES:
            raise data_error(
                folder,
                f"at most {_MOST_FILES} files",
                "more",
                "name the folder that holds the files of MNIST itself",
            )
    return sorted(files)


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        with os.scandir(folder) as entries:
            return [folder / entry.name for entry in itertools.islice(entries, _MOST_FILES + 1)]
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise data_error(folder, "a folder to read", reason, "name one that you may read") from None


def _by_name(folder: pathlib.Path, paths: Iterable[pathlib.Path]) -> dict[str, pathlib.Path]:
    """Return the path for each name; refuse two that may be of different sets."""
    found: dict[str, pathlib.Path] = {}
    for path in paths:  # sorted: the gzip file of a name comes after the plain one
        name = _name(path.name)
        if name is None:
            continue
        other = found.get(name)
        if other is not None and not _is_same(other, path):
            raise _twice(folder, name, other, path)
        found[name] = path
    if NPZ in found and len(found) > 1:
        raise _twice(folder, "MNIST", *sorted(found.values())[:2])
    return found


def _name(file_name: str) -> str | None:
    """Return which file of MNIST has such a name, if one has."""
    lower = file_name.lower()
    if lower == NPZ:
        return NPZ
    match = _IDX.fullmatch(lower)
    if match is None:
        return None
    part = "train" if match[1] == "train" else "t10k"
    return f"{part}-{re.sub('[_.]', '-', match[2])}-ubyte"


def _is_same(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Tell whether two paths are one file, or the plain and the gzip form of one."""
    plain = [path.with_name(path.name.removesuffix(".gz")) for path in (one, other)]
    if plain[0] == plain[1]:
        return True
    return one.exists() and other.exists() and one.samefile(other)


def _twice(folder: pathlib.Path, name: str, one: pathlib.Path, other: pathlib.Path) -> DataError:
    return data_error(
        folder,
        f"one file of {name}",
        f"{one.relative_to(folder)} and {other.relative_to(folder)}",
        "name the folder of the one to take, with --data-dir or TXCORE_DATA",
    )


def _may_be_data(file_name: str) -> bool:
    lower = file_name.lower()
    return "mnist" in lower or "ubyte" in lower or not _DATA.isdisjoint(lower.split(".")[1:])
