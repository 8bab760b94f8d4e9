"""Add up the collectives of an .xplane.pb without txcore and without jax: protobuf's wire by hand.

    python raw_times.py rank0.xplane.pb rank0.0.hlo

An XSpace has planes (1); a plane lines (3) and the names of events (4) and stats (5); a line
events (4); an event a name's number (1), picoseconds (3) and stats (4); a stat its name's number
(1) and a text (5) or the number of one (7).
https://github.com/openxla/xla, tsl/profiler/protobuf/xplane.proto
"""

import re
import sys

OPS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
LINE = re.compile(rf"^\s*(?:ROOT )?%?([\w.\-]+) = .*?\s(?:{OPS})(?:-start)?\(", re.MULTILINE)


def fields(data):
    """Yield the number and value of each field: an int, or bytes."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 2:
            size = varint()
            yield number, data[at : at + size]
            at += size
        elif kind == 0:
            yield number, varint()
        else:
            size = 8 if kind == 1 else 4
            yield number, int.from_bytes(data[at : at + size], "little")
            at += size


def names(plane, which):
    """Return the names of a plane's events (4) or stats (5) by number."""
    found = {}
    for number, entry in fields(plane):
        if number == which:
            pair = dict(fields(entry))
            value = dict(fields(pair.get(2, b"")))
            found[pair.get(1, 0)] = bytes(value.get(2, b"")).decode()
    return found


def time_collectives(trace, hlo):
    """Return calls and nanoseconds of each instruction that is a collective."""
    wanted = set(LINE.findall(hlo))
    found = {}
    for number, plane in fields(trace):
        if number != 1:
            continue
        stats = names(plane, 5)
        for inner, line in fields(plane):
            for kind, event in fields(line) if inner == 3 else ():
                if kind != 4:
                    continue
                parts = list(fields(event))
                duration = next((value for key, value in parts if key == 3), 0)
                for key, stat in parts:
                    said = dict(fields(stat)) if key == 4 else {}
                    if stats.get(said.get(1)) != "hlo_op":
                        continue
                    text = bytes(said[5]).decode() if 5 in said else stats.get(said.get(7), "")
                    if text in wanted:
                        calls, total = found.get(text, (0, 0.0))
                        found[text] = (calls + 1, total + duration / 1e3)
    return found


if __name__ == "__main__":
    with open(sys.argv[1], "rb") as trace, open(sys.argv[2]) as hlo:
        for op, (calls, total) in sorted(time_collectives(trace.read(), hlo.read()).items()):
            print(f"{op}: {calls} calls, {total / 1e6:.6f} ms")
