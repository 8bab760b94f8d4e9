"""The reader gives what was written, and of a bad file one clear error in bounded memory."""

import gzip
import os
import pathlib
import struct
import tempfile
import time
import tracemalloc

import fake_mnist
import numpy as np
import pytest
from data import idx
from hypothesis import given, settings
from hypothesis import strategies as st

IMAGES = fake_mnist.images(3)
LABELS = fake_mnist.labels(20)
PLAIN = fake_mnist.idx_bytes(IMAGES)
PACKED = gzip.compress(PLAIN, mtime=0)
AGAIN = "; delete it and get it again with `python examples/mnist/download.py --data-dir"


@pytest.mark.parametrize("name", ["file.gz", "file"])
@pytest.mark.parametrize(
    "array, read", [(IMAGES, idx.read_images), (LABELS, idx.read_labels)], ids=["images", "labels"]
)
def test_reads_what_was_written(tmp_path, name, array, read):
    path = tmp_path / name
    data = fake_mnist.idx_bytes(array)
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    got = read(str(path))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, array)


def test_reads_a_hand_made_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes.fromhex("00000803 00000002 00000001 00000003 010203 fafbfc"))
    assert idx.read_images(path).tolist() == [[[1, 2, 3]], [[250, 251, 252]]]


def test_real_files(mnist_dir):
    labels = idx.read_labels(mnist_dir / "t10k-labels-idx1-ubyte.gz")
    images = idx.read_images(mnist_dir / "t10k-images-idx3-ubyte.gz")
    assert images.shape == (10_000, 28, 28)
    assert np.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert abs(images.mean() / 255 - 0.1325) < 1e-4


BAD_IMAGES = {
    "empty": ("x", b"", "required a header of 16 bytes, found 0 bytes"),
    "empty gzip": ("x.gz", b"", "required a header of 16 bytes, found 0 bytes"),
    "half a header": ("x", PLAIN[:10], "required a header of 16 bytes, found 10 bytes"),
    "wrong magic": (
        "x",
        fake_mnist.idx_bytes(IMAGES, magic=0x12345678),
        "required magic number 0x00000803 (uint8, 3 dims), found 0x12345678",
    ),
    "labels for images": (
        "x.gz",
        gzip.compress(fake_mnist.idx_bytes(LABELS)),
        "required magic number 0x00000803 (uint8, 3 dims), found 0x00000801",
    ),
    "floats": (
        "x",
        fake_mnist.idx_bytes(IMAGES, magic=0x00000D03),
        "required magic number 0x00000803 (uint8, 3 dims), found 0x00000d03",
    ),
    "truncated data": (
        "x",
        PLAIN[:-1],
        "required 2352 bytes of data for shape [3, 28, 28], found 2351",
    ),
    "truncated data, whole gzip": (
        "x.gz",
        gzip.compress(PLAIN[:-1]),
        "required 2352 bytes of data for shape [3, 28, 28], found 2351",
    ),
    "trailing data": (
        "x",
        PLAIN + b"0",
        "required 2352 bytes of data for shape [3, 28, 28], found more",
    ),
    "oversized gzip": (
        "x.gz",
        gzip.compress(PLAIN + bytes(100_000)),
        "required 2352 bytes of data for shape [3, 28, 28], found more",
    ),
    "truncated gzip": ("x.gz", PACKED[:-9], "required a whole gzip file, found a truncated one"),
    "gzip without its checksum": (
        "x.gz",
        PACKED[:-8],
        "required a whole gzip file, found a truncated one",
    ),
    "gzip with a wrong checksum": (
        "x.gz",
        PACKED[:-8] + bytes(4) + PACKED[-4:],
        "required a gzip file, found a damaged or other one (CRC check failed",
    ),
    "garbage after the gzip": (
        "x.gz",
        PACKED + b"garbage",
        "required a gzip file, found a damaged or other one (Not a gzipped file",
    ),
    "damaged gzip": (
        "x.gz",
        PACKED[:10] + b"\xff" * 200 + PACKED[210:],
        "required a gzip file, found a damaged or other one (Error -3",
    ),
    "not a gzip": (
        "x.gz",
        PLAIN,
        "required a gzip file, found a damaged or other one (Not a gzipped file",
    ),
    "a web page": (
        "x.gz",
        b"<html>Log in to the network</html>",
        "required a gzip file, found a damaged or other one (Not a gzipped file",
    ),
    "too many": (
        "x",
        fake_mnist.idx_bytes(IMAGES, shape=(250_001, 28, 28)),
        "required dims of 1 to [250000, 28, 28], found [250001, 28, 28]",
    ),
    "too large": (
        "x",
        fake_mnist.idx_bytes(IMAGES, shape=(3, 29, 28)),
        "required dims of 1 to [250000, 28, 28], found [3, 29, 28]",
    ),
    "huge": (
        "x.gz",
        gzip.compress(fake_mnist.idx_bytes(IMAGES, shape=(2**32 - 1,) * 3)),
        "required dims of 1 to [250000, 28, 28], found [4294967295, 4294967295, 4294967295]",
    ),
    "none": (
        "x",
        struct.pack(">4I", 0x803, 0, 28, 28),
        "required dims of 1 to [250000, 28, 28], found [0, 28, 28]",
    ),
}


@pytest.mark.parametrize("name, data, text", BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_file(tmp_path, name, data, text):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(idx.DataError) as error:
        idx.read_images(path)
    message = str(error.value)
    assert message.startswith(f"{path}: {text}")
    assert f"{AGAIN} {tmp_path}`" in message
    assert "\n" not in message


def test_a_gzip_under_a_plain_name(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(PACKED)
    with pytest.raises(idx.DataError, match=r"found a gzip file; .* name that ends in \.gz"):
        idx.read_images(path)


def test_images_for_labels(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(PLAIN)
    text = r"required magic number 0x00000801 \(uint8, 1 dims\), found 0x00000803"
    with pytest.raises(idx.DataError, match=text):
        idx.read_labels(path)


def test_no_file(tmp_path):
    with pytest.raises(idx.DataError, match="found no such file or directory; give one that"):
        idx.read_labels(tmp_path / "nothing.gz")


def test_a_folder_and_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    text = "required a file, found a folder, a pipe or a device; give a file's path"
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(idx.DataError, match=text):
            idx.read_images(path)


def test_a_file_of_nothing_but_empty_members_is_refused_unread(tmp_path):
    """Each takes 20 bytes and 16 us: the data of ten labels cannot be in a million of them."""
    path = tmp_path / "file.gz"
    header = gzip.compress(struct.pack(">2I", 0x801, 10))
    path.write_bytes(header + gzip.compress(b"") * 100_000)
    start = time.process_time()
    with pytest.raises(idx.DataError, match="required a file of at most 131082 bytes, found 20000"):
        idx.read_labels(path)
    assert time.process_time() - start < 0.1


@pytest.mark.parametrize(
    "shape, packed",
    [((1, 28, 28), gzip.compress(bytes(100_000_000), 1)), ((250_000, 28, 28), b"")],
    ids=["a bomb", "a promise"],
)
def test_memory_follows_the_smaller_of_promise_and_file(tmp_path, shape, packed):
    header = gzip.compress(struct.pack(">4I", 0x803, *shape))
    path = tmp_path / "file.gz"
    path.write_bytes(header + packed)
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(idx.DataError):
            idx.read_images(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 3_000_000
    assert time.process_time() - start < 1


def edits(data):
    """The data with up to 4 stretches of up to 8 bytes overwritten, and perhaps cut off."""
    place = st.integers(0, len(data) - 1)
    change = st.tuples(place, st.binary(max_size=8))
    return st.tuples(st.lists(change, max_size=4), st.one_of(st.none(), place))


def edited(data, change):
    replaced, end = change
    changed = bytearray(data)
    for place, new in replaced:
        changed[place : place + len(new)] = new
    return bytes(changed[:end])


def read_or_refuse(name, data):
    """Read the data as images; None where it is refused with the one error."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, name)
        path.write_bytes(data)
        try:
            return idx.read_images(path)
        except idx.DataError:
            return None


@settings(deadline=None)  # the machine may be busy
@given(edits(PLAIN))
def test_mutated_plain_file(change):
    data = edited(PLAIN, change)
    got = read_or_refuse("x", data)
    if got is not None:
        assert data == fake_mnist.idx_bytes(got)


@settings(deadline=None)  # the machine may be busy
@given(edits(PACKED))
def test_mutated_gzip_file(change):
    got = read_or_refuse("x.gz", edited(PACKED, change))
    # The gzip checksum catches what touches the data; what it lets through is the original.
    assert got is None or np.array_equal(got, IMAGES)


@settings(deadline=None)  # the machine may be busy
@given(st.binary(max_size=64))
def test_mutated_data_under_a_right_checksum(noise):
    got = read_or_refuse("x.gz", gzip.compress(noise + PLAIN[len(noise) :]))
    assert got is None or got.ndim == 3


@settings(deadline=None)  # the machine may be busy
@given(st.sampled_from(["x", "x.gz"]), st.binary(max_size=64))
def test_noise(name, data):
    read_or_refuse(name, data)
