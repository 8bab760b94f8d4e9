r"""TensorBoard's event files, written by hand: frames of TFRecord around Event protobufs.

A frame is the length as 8 bytes, its checksum, the message, its checksum; all little-endian. A
checksum is CRC-32C, rotated and shifted so that a checksum of data that hold checksums is sound.
https://www.tensorflow.org/tutorials/load_data/tfrecord (the frame),
https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/util/event.proto (the message)
"""

import struct
from collections.abc import Mapping

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, its bits in reverse
_FIRST = b"brain.Event:2"  # what a file's first event says


def _make_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_TABLE = _make_table()


def crc32c(data: bytes) -> int:
    """Return the CRC-32C of data (RFC 3720, B.4).

    Example:
      >>> from txcore.train.event_file import crc32c
      >>> hex(crc32c(b"123456789"))
      '0xe3069283'
    """
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _mask(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame(message: bytes) -> bytes:
    """Return a message in its TFRecord frame."""
    length = struct.pack("<Q", len(message))
    checks = (struct.pack("<I", _mask(crc32c(part))) for part in (length, message))
    return length + next(checks) + message + next(checks)


def encode_start(wall_time: float, first_step: int | None) -> bytes:
    """Return the frames that begin a file.

    Args:
      wall_time: seconds since 1970.
      first_step: the first step that follows, where the folder has files that may hold it too:
        TensorBoard then drops what they have from there on. None where there are no others.
    """
    frames = frame(_time(wall_time) + _text(3, _FIRST))
    if first_step is not None:
        session = _text(7, b"\x08\x01")  # SessionLog.status = START
        frames += frame(_time(wall_time) + b"\x10" + _varint(first_step) + session)
    return frames


def encode_scalars(wall_time: float, step: int, scalars: Mapping[str, float]) -> bytes:
    """Return the frame of one event with scalars by tag, in float32.

    Example:
      >>> from txcore.train.event_file import encode_scalars
      >>> encode_scalars(0.0, 1, {"loss": 0.5})[12:-4].hex(" ", -4)
      '09000000 00000000 0010012a 0d0a0b0a 046c6f73 73150000 003f'
    """
    values = b"".join(
        _text(1, _text(1, tag.encode("utf-8", "replace")) + b"\x15" + _float32(value))
        for tag, value in scalars.items()
    )
    return frame(_time(wall_time) + b"\x10" + _varint(step) + _text(5, values))


def _time(wall_time: float) -> bytes:
    return b"\x09" + struct.pack("<d", wall_time)


def _text(field: int, data: bytes) -> bytes:
    """Return a field of bytes: text, or a message within the message."""
    return bytes([field << 3 | 2]) + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    groups = []
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])


def _float32(value: float) -> bytes:
    try:
        return struct.pack("<f", value)
    except OverflowError:  # beyond float32
        return struct.pack("<f", float("inf") if value > 0 else float("-inf"))
