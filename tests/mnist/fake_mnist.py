"""Write small MNIST-like IDX files, right and wrong ones."""

import gzip
import struct

import numpy as np

NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx_bytes(array, magic=None, shape=None):
    """The IDX file of a uint8 array; `magic` and `shape` overwrite what its header says."""
    magic = 0x00000800 + array.ndim if magic is None else magic
    shape = array.shape if shape is None else shape
    return struct.pack(f">{1 + len(shape)}I", magic, *shape) + array.tobytes()


def images(count, side=28):
    return np.random.default_rng(count).integers(0, 256, (count, side, side), np.uint8)


def labels(count):
    return (np.arange(count) * 7 % 10).astype(np.uint8)


def contents(train=30, test=10):
    """The plain bytes of the four files, by name."""
    arrays = (images(train), labels(train), images(test), labels(test))
    return {name: idx_bytes(array) for name, array in zip(NAMES, arrays, strict=True)}


def write_npz(folder, save=np.savez, **changed):
    """Write the same arrays as Keras does, some replaced or, by None, left out; return the path."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"x_train": images(30), "y_train": labels(30), "x_test": images(10)}
    arrays |= {"y_test": labels(10)} | changed
    save(folder / "mnist.npz", **{k: v for k, v in arrays.items() if v is not None})
    return folder / "mnist.npz"


def write(folder, files=None, packed=True):
    """Write the files, by default the right ones, into the folder, gzip or plain."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (contents() if files is None else files).items():
        path = folder / f"{name}.gz" if packed else folder / name
        path.write_bytes(gzip.compress(data, mtime=0) if packed else data)
    return folder
