"""Read the IDX files of MNIST, gzip or plain: bounded, checked, one clear error.

The format (https://yann.lecun.com/exdb/mnist): a magic number 0x000008DD, where 08 says
uint8 and DD is the number of dims; the dims, each 4 bytes with the high byte first; the data.
"""

import contextlib
import gzip
import io
import os
import pathlib
import stat
import struct
import zlib
from typing import IO

import numpy as np

MAX_ITEMS = 250_000  # the digits of EMNIST, the most in this form, are 240,000
MAX_SIDE = 28  # pixels: no header can ask for more than 196 MB, which are 784 MB as float32
_IMAGES_MAGIC = 0x00000803
_LABELS_MAGIC = 0x00000801
_GZIP_MAGIC = b"\x1f\x8b"
_PIECE_BYTES = 1 << 20
_OVERHEAD_BYTES = 1 << 17  # of a file, beside its data


class DataError(ValueError):
    """A data file or folder is not as required; the message says what to do, in one line."""


def data_error(path: str | pathlib.Path, required: str, found: str, do: str) -> DataError:
    """Return the error for `path`.

    Args:
      path: the file or folder.
      required: what should be there.
      found: what is there.
      do: what the user can do about it.

    Returns:
      The error, to be raised by the caller.

    Example:
      >>> str(data_error(pathlib.Path("x.gz"), "a gzip file", "an empty file", "delete it"))
      'x.gz: required a gzip file, found an empty file; delete it'
    """
    return DataError(f"{path}: required {required}, found {found}; {do}")


def read_images(path: str | pathlib.Path) -> np.ndarray:
    """Read a file of images.

    Args:
      path: an IDX file; gzip where the name ends in ".gz".

    Returns:
      uint8 [n, rows, cols] with 1 <= n <= 250,000 and rows, cols of 1 to 28 pixels.

    Raises:
      DataError: the file cannot be read, is damaged, or is larger than that.

    Example:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "two-pixels")
      >>> _ = path.write_bytes(bytes.fromhex("00000803 00000001 00000001 00000002 07ff"))
      >>> read_images(path).tolist()
      [[[7, 255]]]
    """
    return _read(pathlib.Path(path), _IMAGES_MAGIC, (MAX_ITEMS, MAX_SIDE, MAX_SIDE))


def read_labels(path: str | pathlib.Path) -> np.ndarray:
    """Read a file of labels.

    Args:
      path: an IDX file; gzip where the name ends in ".gz".

    Returns:
      uint8 [n] with 1 <= n <= 250,000, of any value.

    Raises:
      DataError: the file cannot be read, is damaged, or is larger than that.

    Example:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "three-labels")
      >>> _ = path.write_bytes(bytes.fromhex("00000801 00000003 050004"))
      >>> read_labels(path).tolist()
      [5, 0, 4]
    """
    return _read(pathlib.Path(path), _LABELS_MAGIC, (MAX_ITEMS,))


def _read(path: pathlib.Path, magic: int, limits: tuple[int, ...]) -> np.ndarray:
    """Return the array in `path`, reading at most one byte more than its header promises."""
    header_bytes = 4 + 4 * len(limits)
    header = _contents(path, header_bytes, MAX_ITEMS * MAX_SIDE**2)
    shape = _parse_header(path, header, magic, limits)
    promised = int(np.prod(shape))
    data = _contents(path, header_bytes + promised + 1, promised)
    found = len(data) - header_bytes
    if found != promised:
        raise data_error(
            path,
            f"{promised} bytes of data for shape {list(shape)}",
            f"{found}" if found < promised else "more",
            _again(path),
        )
    return np.frombuffer(data, np.uint8, offset=header_bytes).reshape(shape)


def _parse_header(
    path: pathlib.Path, header: bytes | bytearray, magic: int, limits: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the shape that the header states."""
    header_bytes = 4 + 4 * len(limits)
    if len(header) < header_bytes:
        raise data_error(
            path, f"a header of {header_bytes} bytes", f"{len(header)} bytes", _again(path)
        )
    found, *shape = struct.unpack(f">{1 + len(limits)}I", header)
    if found != magic:
        is_gzip = header.startswith(_GZIP_MAGIC)
        raise data_error(
            path,
            f"magic number 0x{magic:08x} (uint8, {len(limits)} dims)",
            "a gzip file" if is_gzip else f"0x{found:08x}",
            "give it a name that ends in .gz" if is_gzip else _again(path),
        )
    if not all(1 <= size <= limit for size, limit in zip(shape, limits, strict=True)):
        raise data_error(path, f"dims of 1 to {list(limits)}", f"{shape}", _again(path))
    return tuple(shape)


def _contents(path: pathlib.Path, limit: int, promised: int) -> bytearray:
    """Return the first `limit` bytes of the file, unpacked; fewer where it ends before.

    However it is packed, a file is hardly longer than the data that it is said to hold.
    """
    try:
        with contextlib.ExitStack() as files:
            file = files.enter_context(open_regular(path))
            most = promised + promised // 100 + _OVERHEAD_BYTES  # deflate adds 5 bytes to 65,535
            if (found := os.fstat(file.fileno()).st_size) > most:
                raise data_error(path, f"a file of at most {most} bytes", f"{found}", _again(path))
            if path.suffix == ".gz":
                return read_up_to(files.enter_context(gzip.GzipFile(fileobj=file)), limit)
            return read_up_to(file, limit)
    except EOFError:
        raise data_error(path, "a whole gzip file", "a truncated one", _again(path)) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise data_error(
            path, "a gzip file", f"a damaged or other one ({error})", _again(path)
        ) from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise data_error(path, "a file to read", reason, "give one that you may read") from None


def open_regular(path: pathlib.Path) -> IO[bytes]:
    """Open a regular file to read; a pipe, for whose writer opening would wait, is refused.

    Raises:
      DataError: it is a folder, a pipe or a device.
      OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise data_error(path, "a file", "a folder, a pipe or a device", "give a file's path")
    return open(descriptor, "rb")


def read_up_to(file: IO[bytes] | io.BufferedIOBase, limit: int) -> bytearray:
    """Return up to `limit` bytes, holding no more than there are, whatever the limit is."""
    data = bytearray()
    while piece := file.read(min(_PIECE_BYTES, limit - len(data))):
        data += piece
    return data


def _again(path: pathlib.Path) -> str:
    return (
        "delete it and get it again with "
        f"`python examples/mnist/download.py --data-dir {path.parent}`"
    )
