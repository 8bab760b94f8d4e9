"""jax's coordinator takes no more connections once every rank is in; who comes is told so.

Whoever reaches the port of jax's coordinator may say that it is one of the ranks, and is believed:
the real one then aborts, at once or at its end. jax needs no second connection of a rank: it aborts
when the first one breaks. So Linux drops what comes for jax, and leads newcomers to a second
listener of the port, where this process answers them.
"""

import ctypes
import os
import pathlib
import socket
import struct
import sys

_PROC = pathlib.Path("/proc/self")
_LISTEN = "0A"  # TCP_LISTEN in Linux's include/net/tcp_states.h
_SO_ATTACH_FILTER = 26  # Linux's include/uapi/asm-generic/socket.h
_SO_ATTACH_REUSEPORT_CBPF = 51  # the same file: which of a port's listeners a newcomer gets
_TRIED_S = 1.0  # for a connection to this process itself


def hold(listener: socket.socket) -> None:
    """Stop listening but keep the port, which only who shares ports of this user may then take.

    jax's server does share; the meeting of another run does not, and stays out. On other systems
    than Linux the port is let go.
    """
    if sys.platform != "linux":
        listener.close()
        return
    listener.shutdown(socket.SHUT_RDWR)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def take(port: int) -> tuple[bool, socket.socket | None]:
    """Close a port on which this process listens, and listen there in the other's place.

    Returns:
      Whether it is closed, and who listens now; None where the system does not lead newcomers
      there.
    """
    listener = _stand_in_for(port)
    closed = close_door(port, but=listener)
    return closed, listener


def close_door(port: int, but: socket.socket | None = None) -> bool:
    """Have Linux drop what comes for a port on which this process listens; connections stay.

    Args:
      port: of the listeners.
      but: one that stays open.

    Returns:
      Whether it was done; not on other systems than Linux.
    """
    try:
        listeners = [one for one in _listeners(port) if but is None or one != but.fileno()]
        for descriptor in listeners:
            with socket.socket(fileno=os.dup(descriptor)) as listener:
                _attach(listener, _SO_ATTACH_FILTER, 0)  # keep 0 bytes
        return bool(listeners)
    except OSError:
        return False


def _stand_in_for(port: int) -> socket.socket | None:
    """Return a listener that gets all newcomers of a port on which this process listens."""
    try:
        listeners = _listeners(port)
        if not listeners:
            return None
        with socket.socket(fileno=os.dup(listeners[0])) as first:
            address, own = first.getsockname(), socket.socket(first.family)
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if first.family == socket.AF_INET6:
                only = first.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
                own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
    except OSError:
        return None
    try:
        own.bind(address)
        own.listen(1024)
        _attach(own, _SO_ATTACH_REUSEPORT_CBPF, len(listeners))  # the last of them: this one
        if _gets_newcomers(own):
            return own
    except OSError:
        pass
    own.close()
    return None


def _gets_newcomers(own: socket.socket) -> bool:
    """Tell whether connections come here, by making one."""
    host, port = own.getsockname()[:2]
    loopback = "::1" if own.family == socket.AF_INET6 else "127.0.0.1"
    own.settimeout(_TRIED_S)
    host = loopback if host in ("::", "0.0.0.0") else host
    with socket.create_connection((host, port), timeout=_TRIED_S), own.accept()[0]:
        return True


def _attach(listener: socket.socket, option: int, value: int) -> None:
    """Attach a filter that returns a number: one instruction, BPF_RET | BPF_K."""
    program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, value))
    pointer = struct.pack("HP", 1, ctypes.addressof(program))  # struct sock_fprog
    listener.setsockopt(socket.SOL_SOCKET, option, pointer)


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
