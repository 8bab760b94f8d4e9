"""Read Keras' mnist.npz: no pickle, bounded, checked, one clear error.

A zip archive of NumPy files: x_train.npy and x_test.npy, uint8 [n, 28, 28]; y_train.npy and
y_test.npy, [n] (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html).
"""

import os
import pathlib
import re
import struct
import zipfile
import zlib

import numpy as np

from data.idx import MAX_ITEMS, MAX_SIDE, DataError, data_error, open_regular, read_up_to

MAX_BYTES = 1 << 26  # of the file: Keras' has 11.5 MB, the same uncompressed 55 MB
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_MAGIC = b"\x93NUMPY"
_LONGEST_HEADER = 1 << 12
# NumPy writes no other form; it evaluates what it reads.
_HEADER = re.compile(
    r"\{'descr': '([<>|=][ui][1248])', 'fortran_order': (False|True), "
    r"'shape': \((\d{1,9}(?:, \d{1,9})*),?\), \}\s*",
    re.ASCII,
)


def read_npz(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Read the four arrays.

    Args:
      path: the file.

    Returns:
      By name, x_train and x_test uint8 [n, rows, cols], y_train and y_test [n] of integers, with
      1 <= n <= 250,000 and rows, cols of 1 to 28 pixels.

    Raises:
      DataError: the file cannot be read, is damaged or of another form, or is larger than that.

    Example:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "mnist.npz")
      >>> image, label = np.zeros((2, 28, 28), np.uint8), np.array([5, 0])
      >>> np.savez(path, x_train=image, y_train=label, x_test=image[:1], y_test=label[:1])
      >>> {name: array.shape for name, array in read_npz(path).items()}
      {'x_train': (2, 28, 28), 'y_train': (2,), 'x_test': (1, 28, 28), 'y_test': (1,)}
    """
    path = pathlib.Path(path)
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise data_error(
                    path, f"at most {MAX_BYTES} bytes", "more", "give the four IDX files instead"
                )
            with zipfile.ZipFile(file) as archive:
                return {name: _array(path, archive, name) for name in ARRAYS}
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise data_error(path, "a file to read", reason, "give one that you may read") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise _bad(path, "a whole zip archive", f"a damaged or other one ({error})") from None


def _array(path: pathlib.Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Return one array, reading at most one byte more than its header promises."""
    try:
        member = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise _bad(path, f"the arrays {', '.join(ARRAYS)}", f"no {name}") from None
    with archive.open(member) as file:
        prefix = file.read(len(_MAGIC) + 2)
        if prefix[:-2] != _MAGIC or prefix[-2] not in (1, 2, 3):
            raise _bad(path, f"{name} as a NumPy file", "something else")
        form = "<H" if prefix[-2] == 1 else "<I"
        length = file.read(struct.calcsize(form))
        if len(length) < struct.calcsize(form):
            raise _bad(path, f"{name} with a header", "its beginning")
        dtype, shape, order = _header(
            path, name, file.read(min(struct.unpack(form, length)[0], _LONGEST_HEADER))
        )
        promised = int(np.prod(shape)) * dtype.itemsize
        data = read_up_to(file, promised + 1)
    if len(data) != promised:
        found = f"{len(data)}" if len(data) < promised else "more"
        raise _bad(path, f"{promised} bytes of {name} for shape {list(shape)}", found)
    return np.frombuffer(data, dtype).reshape(shape, order="F" if order == "True" else "C")


def _header(path: pathlib.Path, name: str, header: bytes) -> tuple[np.dtype, tuple[int, ...], str]:
    """Return dtype, shape and order that a NumPy file's header states."""
    is_images = name.startswith("x_")
    limits = (MAX_ITEMS, MAX_SIDE, MAX_SIDE) if is_images else (MAX_ITEMS,)
    found = _HEADER.fullmatch(header.decode("latin-1"))
    if found is None:
        text = " ".join(header[:80].decode("ascii", "replace").split())
        raise _bad(path, f"{name} of integers", text)
    dtype = np.dtype(found[1])
    if is_images and dtype != np.uint8:
        raise _bad(path, f"{name} as uint8", f"{dtype}")
    shape = tuple(map(int, found[3].split(", ")))
    fits = len(shape) == len(limits) and all(
        1 <= size <= limit for size, limit in zip(shape, limits, strict=False)
    )
    if not fits:
        raise _bad(path, f"{name} with dims of 1 to {list(limits)}", f"{list(shape)}")
    return dtype, shape, found[2]


def _bad(path: pathlib.Path, required: str, found: str) -> DataError:
    return data_error(path, required, found, "give Keras' mnist.npz, or the four IDX files")
