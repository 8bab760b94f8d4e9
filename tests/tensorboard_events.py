"""Decode TensorBoard's event files: TFRecord frames and protobuf's wire format, written apart."""

import struct


def crc32c(data):
    """The bitwise definition, without a table: RFC 3720's polynomial, reflected."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 * (crc & 1))
    return crc ^ 0xFFFFFFFF


def unmasked(data):
    """Return the checksum that a masked one stands for."""
    (masked,) = struct.unpack("<I", data)
    rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF


def read_frames(data):
    """Yield the message of each frame, its checksums checked."""
    place = 0
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        assert unmasked(data[place + 8 : place + 12]) == crc32c(data[place : place + 8])
        message = data[place + 12 : place + 12 + length]
        assert len(message) == length, "cut off"
        end = place + 12 + length
        assert unmasked(data[end : end + 4]) == crc32c(message)
        yield message
        place = end + 4


def read_fields(message):
    """Return {field: [values]}: integers of varints, bytes of the other kinds."""
    fields, place = {}, 0

    def varint():
        nonlocal place
        number = shift = 0
        while True:
            byte = message[place]
            place += 1
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return number

    while place < len(message):
        key = varint()
        size = {1: 8, 5: 4}.get(key & 7)
        if key & 7 == 0:
            value = varint()
        else:
            size = varint() if size is None else size
            value = message[place : place + size]
            assert len(value) == size
            place += size
        fields.setdefault(key >> 3, []).append(value)
    return fields


def read_events(path):
    """Return (step, {tag: value}, text of the version, first step of a session) of each event."""
    events = []
    for message in read_frames(path.read_bytes()):
        fields = read_fields(message)
        assert len(fields[1][0]) == 8, "a wall time"
        scalars = {}
        for value in read_fields(fields[5][0]).get(1, []) if 5 in fields else []:
            one = read_fields(value)
            scalars[one[1][0].decode()] = struct.unpack("<f", one[2][0])[0]
        started = 7 in fields and read_fields(fields[7][0]) == {1: [1]}
        step = fields.get(2, [0])[0]
        events.append((step, scalars, fields.get(3, [b""])[0].decode(), started))
    return events
