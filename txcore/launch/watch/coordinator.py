"""Watch the coordinator's process through the connections to it that jax keeps open."""

import os
import pathlib
import select
import socket

_OPEN_FILES = pathlib.Path("/proc/self/fd")
# Linux only: the other side has closed, even if data is still unread.
_CLOSED = getattr(select, "POLLRDHUP", 0)


class CoordinatorWatch:
    """Notice at once that the coordinator's process has ended.

    The kernel closes its connections then. jax notices that too, and aborts this process 0.1 to
    0.3 s later, which leaves the time to write which rank was lost. Outside Linux nothing is
    noticed, and jax aborts.

    Args:
      address: "host:port" of the coordinator; None where it is this process.
    """

    def __init__(self, address: str | None) -> None:
        port = (address or "").rpartition(":")[2]
        self._port = int(port) if port.isdigit() and _CLOSED else None
        self._sockets = _duplicate_connections(self._port)
        self._bell, self._button = socket.socketpair()

    def wait(self, seconds: float) -> bool:
        """Wait until no connection is left or `wake`, or for so long; tell whether none is left."""
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        for connection in self._sockets:
            poll.register(connection, _CLOSED)
        events = dict(poll.poll(seconds * 1000))
        if events.pop(self._bell.fileno(), None):
            self._bell.recv(4096)
        if not events:
            return False
        # gRPC closes connections that it does not need: only the loss of all counts.
        self._let_go()
        self._sockets = _duplicate_connections(self._port)
        return not self._sockets

    def wake(self) -> None:
        """End the other thread's `wait`."""
        self._button.send(b"!")

    def close(self) -> None:
        """Close the duplicates; jax's own connections stay open."""
        self._let_go()
        self._bell.close()
        self._button.close()

    def _let_go(self) -> None:
        for connection in self._sockets:
            connection.close()
        self._sockets = []


def _duplicate_connections(port: int | None) -> list[socket.socket]:
    """Return duplicates of this process's open connections to `port`."""
    found: list[socket.socket] = []
    if port is None or not _OPEN_FILES.exists():
        return found
    for name in os.listdir(_OPEN_FILES):
        try:
            if not os.readlink(_OPEN_FILES / name).startswith("socket:"):
                continue
            connection = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # closed meanwhile
            continue
        if _leads_to(port, connection):
            found.append(connection)
        else:
            connection.close()
    return found


def _leads_to(port: int, connection: socket.socket) -> bool:
    try:
        peer = connection.getpeername()
    except OSError:  # it listens, or has been closed
        return False
    poll = select.poll()
    poll.register(connection, _CLOSED)
    return isinstance(peer, tuple) and peer[1] == port and not poll.poll(0)
