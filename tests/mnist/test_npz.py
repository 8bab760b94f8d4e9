"""Keras' file is read without pickle, within bounds; a bad one is refused in one line."""

import contextlib
import os
import random
import struct
import zipfile

import fake_mnist
import numpy as np
import pytest
from data import idx, npz

AGAIN = "; give Keras' mnist.npz, or the four IDX files"


def refusal(path):
    with pytest.raises(idx.DataError) as error:
        npz.read_npz(path)
    text = str(error.value)
    assert text.startswith(f"{path}: required ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["u1", "<i8", ">i4", "<u2"])
def test_values(tmp_path, save, dtype):
    labels = fake_mnist.labels(30).astype(dtype)
    path = fake_mnist.write_npz(tmp_path, save, y_train=labels, more=np.ones(3))
    read = npz.read_npz(path)
    assert list(read) == ["x_train", "y_train", "x_test", "y_test"]
    np.testing.assert_array_equal(read["x_train"], fake_mnist.images(30))
    np.testing.assert_array_equal(read["y_train"], fake_mnist.labels(30))
    assert read["y_test"].dtype == np.uint8


def test_fortran_order(tmp_path):
    path = fake_mnist.write_npz(tmp_path, x_test=np.asfortranarray(fake_mnist.images(10)))
    np.testing.assert_array_equal(npz.read_npz(path)["x_test"], fake_mnist.images(10))


OTHERS = {
    "an array is missing": ({"y_test": None}, "the arrays x_train, y_train, x_test, y_test, found "
                            "no y_test"),
    "pickled": ({"y_test": np.array([1, None])}, "y_test of integers, found {'descr': '|O'"),
    "floats": ({"y_test": np.ones(10)}, "y_test of integers, found {'descr': '<f8'"),
    "float images": ({"x_test": np.ones((10, 28, 28), np.float32)}, "x_test of integers, found"),
    "wide images": ({"x_test": np.ones((10, 28, 28), np.int32)}, "x_test as uint8, found int32"),
    "flat images": ({"x_test": np.ones((10, 784), np.uint8)},
                    "x_test with dims of 1 to [250000, 28, 28], found [10, 784]"),
    "one hot labels": ({"y_test": np.ones((10, 10), np.uint8)}, "y_test with dims of 1 to"),
    "no image": ({"x_test": np.ones((0, 28, 28), np.uint8)}, "x_test with dims of 1 to"),
    "one label": ({"y_test": np.uint8(3)}, "y_test of integers, found {'descr': '|u1'"),
    "large images": ({"x_test": np.ones((2, 29, 28), np.uint8)}, "x_test with dims of 1 to"),
}  # fmt: skip


@pytest.mark.parametrize("arrays, text", OTHERS.values(), ids=OTHERS)
def test_arrays_of_another_kind(tmp_path, arrays, text):
    refused = refusal(fake_mnist.write_npz(tmp_path, **arrays))
    assert refused.startswith(f"required {text}")
    assert refused.endswith(AGAIN)


def member(header, data, version=b"\x01\x00"):
    text = header.encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data


def archive(tmp_path, x_train, method=zipfile.ZIP_DEFLATED):
    """Write an archive whose x_train.npy is these bytes."""
    path = tmp_path / "mnist.npz"
    with zipfile.ZipFile(path, "w", method) as whole:
        whole.writestr("x_train.npy", x_train)
    return path


HEADER = "{{'descr': '|u1', 'fortran_order': False, 'shape': ({}, 28, 28), }}\n"


def test_a_bomb_is_read_no_further_than_its_header_promises(tmp_path):
    """200 MB of zeros in 0.2 MB; one image is promised."""
    bomb = member(HEADER.format(1), bytes(200_000_000))
    path = archive(tmp_path, bomb)
    assert path.stat().st_size < 1_000_000
    assert refusal(path).startswith(
        "required 784 bytes of x_train for shape [1, 28, 28], found more"
    )


def test_a_header_that_promises_too_much(tmp_path):
    path = archive(tmp_path, member(HEADER.format(999_999_999), b"x"))
    assert "dims of 1 to [250000, 28, 28], found [999999999, 28, 28]" in refusal(path)
    path = archive(tmp_path, member(HEADER.format(250_000), b"x"))
    assert "required 196000000 bytes of x_train" in refusal(path)


@pytest.mark.parametrize(
    "data, text",
    [
        (b"", "x_train as a NumPy file, found something else"),
        (b"\x93NUMPY\x09\x00\x00\x00", "x_train as a NumPy file, found something else"),
        (b"\x93NUMPY\x01\x00\x40", "x_train with a header, found its beginning"),
        (member("__import__('os').system('true')", b""), "x_train of integers, found __import__("),
        (member("(" * 4000, b""), "x_train of integers, found (((("),
    ],
)
def test_a_member_that_is_no_array(tmp_path, data, text):
    assert refusal(archive(tmp_path, data)).startswith(f"required {text}")


def test_a_longer_file(tmp_path, monkeypatch):
    path = fake_mnist.write_npz(tmp_path)
    monkeypatch.setattr(npz, "MAX_BYTES", 1000)
    assert refusal(path) == (
        "required at most 1000 bytes, found more; give the four IDX files instead"
    )


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "mnist.npz")
    assert "found a folder, a pipe or a device" in refusal(tmp_path / "mnist.npz")


def test_files_that_are_none(tmp_path):
    path = tmp_path / "mnist.npz"
    assert refusal(path).startswith("required a file to read, found no such file")
    path.write_bytes(b"PK")
    assert refusal(path).startswith("required a whole zip archive, found a damaged or other one (")
    path.unlink()
    path.mkdir()
    assert refusal(path).startswith("required a file, found a folder, a pipe or a device")


def test_damaged_files_are_refused_or_read_right(tmp_path):
    """Any byte changed, any end cut off: one clear error, or the right values."""
    rng = random.Random(0)
    want = {"x_train": fake_mnist.images(3), "y_train": fake_mnist.labels(3)}
    want |= {"x_test": fake_mnist.images(2), "y_test": fake_mnist.labels(2)}
    path = fake_mnist.write_npz(tmp_path, np.savez_compressed, **want)
    data = path.read_bytes()
    read = []
    for _ in range(600):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 3))):
            changed[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.2:
            del changed[rng.randrange(len(data)) :]
        path.write_bytes(changed)
        with contextlib.suppress(idx.DataError):
            read.append(npz.read_npz(path))
    assert 0 < len(read) < 600
    for arrays in read:
        for name, array in want.items():
            np.testing.assert_array_equal(arrays[name], array)
