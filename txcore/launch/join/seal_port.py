"""Close the port of jax's coordinator once every rank has joined, and answer newcomers there.

jax's coordinator trusts any process that claims to be one of the ranks: the real one then aborts,
at once or at its end. A rank never needs a second connection, since jax aborts when the first one
breaks. So Linux drops new connections to jax, and leads newcomers to a second listener of the
port, where this process answers them.
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
_SO_ATTACH_REUSEPORT_CBPF = 51  # the same file: chooses which of a port's listeners gets a newcomer
_TRIED_S = 1.0  # for a trial connection to this process itself


def hold_port(listener: socket.socket) -> None:
    """Stop listening but keep the port, so that only a sharing listener of this user can take it.

    jax's server shares its port; the meeting of another run does not, and stays out. Outside Linux
    the port is released.
    """
    if sys.platform != "linux":
        listener.close()
        return
    listener.shutdown(socket.SHUT_RDWR)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def take_over_port(port: int) -> tuple[bool, socket.socket | None]:
    """Close a port on which this process listens, and listen there instead.

    Returns:
      Whether the port is closed, and the new listener; None where the system does not lead
      newcomers to it.
    """
    listener = _listen_instead(port)
    closed = seal_listeners(port, but=listener)
    return closed, listener


def seal_listeners(port: int, but: socket.socket | None = None) -> bool:
    """Have Linux drop new connections to a port on which this process listens; keep the old ones.

    Args:
      port: of the listeners.
      but: a listener that stays open.

    Returns:
      Whether it was done; False outside Linux.
    """
    try:
        listeners = [one for one in _find_listeners(port) if but is None or one != but.fileno()]
        for descriptor in listeners:
            with socket.socket(fileno=os.dup(descriptor)) as listener:
                _attach_filter(listener, _SO_ATTACH_FILTER, 0)  # keep 0 bytes
        return bool(listeners)
    except OSError:
        return False


def _listen_instead(port: int) -> socket.socket | None:
    """Return a new listener that gets all newcomers of a port on which this process listens."""
    try:
        listeners = _find_listeners(port)
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
        _attach_filter(own, _SO_ATTACH_REUSEPORT_CBPF, len(listeners))  # the last of them: this one
        if _gets_newcomers(own):
            return own
    except OSError:
        pass
    own.close()
    return None


def _gets_newcomers(own: socket.socket) -> bool:
    """Tell whether new connections arrive at a listener, by making one."""
    host, port = own.getsockname()[:2]
    loopback = "::1" if own.family == socket.AF_INET6 else "127.0.0.1"
    own.settimeout(_TRIED_S)
    host = loopback if host in ("::", "0.0.0.0") else host
    with socket.create_connection((host, port), timeout=_TRIED_S), own.accept()[0]:
        return True


def _attach_filter(listener: socket.socket, option: int, value: int) -> None:
    """Attach a filter that returns a number: one instruction, BPF_RET | BPF_K."""
    program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, value))
    pointer = struct.pack("HP", 1, ctypes.addressof(program))  # struct sock_fprog
    listener.setsockopt(socket.SOL_SOCKET, option, pointer)


def _find_listeners(port: int) -> list[int]:
    """Return this process's file descriptors that listen on a port."""
    sockets = set()
    for table in (_PROC / "net" / "tcp", _PROC / "net" / "tcp6"):
        lines = table.read_text().splitlines()[1:] if table.exists() else []
        for row in map(str.split, lines):
            address, state, inode = row[1], row[3], row[9]
            if state == _LISTEN and int(address.rpartition(":")[2], 16) == port:
                sockets.add(f"socket:[{inode}]")
    found = []
    for entry in (_PROC / "fd").iterdir():
        try:
            if os.readlink(entry) in sockets:
                found.append(int(entry.name))
        except OSError:  # closed since
            continue
    return found
