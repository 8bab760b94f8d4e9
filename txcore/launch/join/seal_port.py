"""The coordinator's port takes no more connections once every rank is in.

Whoever reaches the port of jax's coordinator may say that it is one of the ranks, and is believed:
the real one then aborts, at once or at its end. jax needs no second connection of a rank: it aborts
when the first one breaks.
"""

import ctypes
import os
import pathlib
import socket
import struct

_PROC = pathlib.Path("/proc/self")
_LISTEN = "0A"  # TCP_LISTEN in Linux's include/net/tcp_states.h
_SO_ATTACH_FILTER = 26  # Linux's include/uapi/asm-generic/socket.h
_DROP = struct.pack("HBBI", 0x06, 0, 0, 0)  # one instruction, BPF_RET | BPF_K: keep 0 bytes


def close_door(port: int) -> bool:
    """Have Linux drop what comes for a port on which this process listens; connections stay.

    Returns:
      Whether it was done; not on other systems than Linux.
    """
    try:
        listeners = _listeners(port)
        for descriptor in listeners:
            with socket.socket(fileno=os.dup(descriptor)) as listener:
                program = ctypes.create_string_buffer(_DROP)
                pointer = struct.pack("HP", 1, ctypes.addressof(program))  # struct sock_fprog
                listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, pointer)
        return bool(listeners)
    except OSError:
        return False


def _listeners(port: int) -> list[int]:
    """Return this process's file descriptors that listen on a port."""
    tables = [_PROC / "net" / name for name in ("tcp", "tcp6")]
    rows = [row.split() for t in tables if t.exists() for row in t.read_text().splitlines()[1:]]
    sockets = {
        f"socket:[{row[9]}]"
        for row in rows
        if row[3] == _LISTEN and int(row[1].rpartition(":")[2], 16) == port
    }
    found = []
    for entry in (_PROC / "fd").iterdir():
        try:
            if os.readlink(entry) in sockets:
                found.append(int(entry.name))
        except OSError:  # closed since
            continue
    return found
