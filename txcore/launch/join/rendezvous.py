"""The processes of a run meet before jax joins them: who is there, and who is missing.

jax's own join ends the process without a chance and without a name when one does not come (SIGABRT,
"Deadline Exceeded", on 0.10 to 0.12). So they meet at the coordinator's port first: each connects
to process 0 and says who it is, and process 0 tells them who is missing until nobody is.
"""

import contextlib
import json
import selectors
import socket
import time
from collections.abc import Iterable
from typing import Any

from txcore.errors import TxcoreError
from txcore.launch.join.addresses import split_address

ATTEMPTS = 3  # to listen where another program listens still
_LONGEST_LINE = 2**16  # bytes; nobody has more to say
_STRANGERS = 256  # connections that said nothing yet and are kept
_MOST_NAMED = 16  # processes in a message


class NotTogether(TxcoreError, RuntimeError):
    """The processes of a run did not come together; the message says which and what to do."""


def listen(address: str, deadline: float) -> socket.socket:
    """Return a socket that listens at "host:port", alone; it may take three attempts.

    jax's own server shares its port with whoever of the same user listens there as well, and each
    gets a part of the ranks.

    Args:
      address: where to listen.
      deadline: by time.monotonic(), when there is no further attempt.

    Raises:
      NotTogether: another program has the port, or the address is not this host's.
    """
    host, port = split_address(address)
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if host == "::":
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    for attempt in range(ATTEMPTS):
        try:
            listener.bind((host, port))
            listener.listen(1024)
            return listener
        except OSError as error:
            reason = error.strerror
            pause = 2.0**attempt
            if attempt == ATTEMPTS - 1 or time.monotonic() + pause > deadline:
                break
            time.sleep(pause)
    listener.close()
    raise NotTogether(
        f"process 0 must listen on {address}, but cannot ({reason}): end what listens there (a "
        "second process 0? another run?), or take another port (JAX_COORDINATOR_PORT, "
        "coordinator=, or --coordinator of txcore launch); if it is not an address of this host, "
        "start process 0 on the coordinator's host, or set JAX_COORDINATOR_BIND_ADDRESS"
    )


class Host:
    """Process 0: takes in the others until all are there.

    Args:
      listener: from `listen`.
      size: how many processes there are.
      name: of this host.
    """

    def __init__(self, listener: socket.socket, size: int, name: str) -> None:
        self._listener, self._size = listener, size
        self._names = {0: name}
        self._there: dict[int, socket.socket] = {}
        self._strangers: dict[socket.socket, bytes] = {}  # and what each has said so far
        self._told: Any = None
        self._tell_again = 0.0

    def missing(self) -> list[int]:
        """Return the processes that have not come."""
        return [rank for rank in range(1, self._size) if rank not in self._there]

    def gather(self, deadline: float) -> None:
        """Wait until all have come, and tell them so.

        Raises:
          NotTogether: not all have come in time.
        """
        try:
            with selectors.DefaultSelector() as selector:
                self._listener.setblocking(False)
                selector.register(self._listener, selectors.EVENT_READ)
                while missing := self.missing():
                    self._tell(missing)
                    if time.monotonic() >= deadline:
                        raise NotTogether(self._did_not_come(missing))
                    left = max(0.0, deadline - time.monotonic())
                    for key, _ in selector.select(min(left, 0.5)):
                        self._hear(key.fileobj, selector)
        except BaseException as error:
            self._send_all(error=str(error) or "process 0 was stopped")
            _close(self._there.values())
            raise
        finally:  # before the others go on: jax's server is to have the port
            _close([self._listener, *self._strangers])
        self._send_all(missing=[])
        _close(self._there.values())

    def _hear(self, connection: Any, selector: selectors.BaseSelector) -> None:
        """Take in a newcomer, what one says, or that it is gone."""
        if connection is self._listener:
            with contextlib.suppress(OSError):
                newcomer, _ = connection.accept()
                newcomer.setblocking(False)
                self._strangers[newcomer] = b""
                selector.register(newcomer, selectors.EVENT_READ)
            if len(self._strangers) > _STRANGERS + self._size:
                self._drop(next(iter(self._strangers)), selector)
            return
        if connection.fileno() < 0:  # dropped since select said that there was something
            return
        try:
            data = connection.recv(_LONGEST_LINE)
        except OSError:
            data = b""
        said = self._strangers.get(connection, b"") + data
        if not data or connection not in self._strangers or len(said) > _LONGEST_LINE:
            self._drop(connection, selector)
        elif said.endswith(b"\n"):
            self._admit(connection, said, selector)
        else:
            self._strangers[connection] = said

    def _admit(self, connection: Any, said: bytes, selector: selectors.BaseSelector) -> None:
        """Take a newcomer for the process that it says it is, if it can be that one."""
        greeting = _parse(said)
        rank, size, name = (greeting.get(key) for key in ("rank", "size", "host"))
        if type(rank) is not int or type(size) is not int or not isinstance(name, str):
            self._drop(connection, selector)
            return
        error, name = None, _clean(name, 64)
        if size != self._size:
            error = (
                f"process {rank} (on {name}) was started with num_processes={size}, but "
                f"process 0 (on {self._names[0]}) with {self._size}: give all the same"
            )
        elif not 0 < rank < size or rank in self._there:
            error = (
                f"process_id={rank} is taken by a process on {self._names.get(rank, '?')}, and "
                f"another on {name} has it too: give each its own, from 0 to {size - 1}"
            )
        if error:
            _send(connection, error=error)
            self._drop(connection, selector)
            return
        del self._strangers[connection]
        self._there[rank], self._names[rank] = connection, name

    def _drop(self, connection: Any, selector: selectors.BaseSelector) -> None:
        """Forget a connection, and the process that it was of."""
        selector.unregister(connection)
        connection.close()
        self._strangers.pop(connection, None)
        for rank in [rank for rank, c in self._there.items() if c is connection]:
            del self._there[rank]

    def _tell(self, missing: list[int]) -> None:
        """Say who is missing to all that are there, where it is new, and not too often."""
        now, news = time.monotonic(), (tuple(missing), tuple(sorted(self._there)))
        if news != self._told and now >= self._tell_again:
            self._send_all(missing=missing)
            self._told, self._tell_again = news, now + self._size / 1000

    def _send_all(self, **what: Any) -> None:
        for connection in self._there.values():
            _send(connection, **what)

    def _did_not_come(self, missing: list[int]) -> str:
        never = [rank for rank in missing if rank not in self._names]
        gone = [rank for rank in missing if rank in self._names]
        here = ", ".join(f"{rank} on {self._names[rank]}" for rank in sorted({0, *self._there}))
        what = [f"{_named(never)} did not come"] if never else []
        what += [f"{_named(gone)} came and ended again"] if gone else []
        return f"{' and '.join(what)} (here: {_cut(here)})"


def attend(address: str, rank: int, size: int, deadline: float) -> None:
    """Tell process 0 that this one is here, and wait until all are.

    Args:
      address: "host:port" of the coordinator.
      rank: which process this is.
      size: how many there are.
      deadline: by time.monotonic().

    Raises:
      NotTogether: process 0 or another one did not come in time, or does not agree.
    """
    greeting = {"txcore": 1, "rank": rank, "size": size, "host": socket.gethostname()}
    pause, missing, reason = 0.05, [0], "nothing tried"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(split_address(address), timeout=min(left, 10))
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that cannot be one
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        else:
            with connection:
                # Somebody who waits long may be connected to itself: both ends have the port.
                if connection.getsockname() != connection.getpeername():
                    missing = _wait(connection, greeting, deadline)
                    reason = "who answers there waits for no process of this run"
            if not missing:
                return
        time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        pause = min(2 * pause, 2.0)
    if 0 in missing:
        raise NotTogether(f"process 0 did not come: it does not answer at {address} ({reason})")
    raise NotTogether(f"{_named(missing)} did not come")


def _wait(connection: socket.socket, greeting: dict[str, Any], deadline: float) -> list[int]:
    """Greet process 0 and return who is missing in the end; [0] if it is not process 0 or is gone.

    The deadline of process 0 may be a little later: it is to say who is missing.
    """
    missing, said = [0], b""
    _send(connection, **greeting)
    while len(said) < _LONGEST_LINE:
        connection.settimeout(max(0.1, deadline + 1 - time.monotonic()))
        try:
            data = connection.recv(_LONGEST_LINE)
        except TimeoutError:
            return missing
        except OSError:
            return [0]
        if not data:
            return [0]
        *lines, said = (said + data).split(b"\n")
        for answer in map(_parse, lines):
            if isinstance(answer.get("error"), str):
                raise NotTogether(_clean(answer["error"], 2000))
            if not isinstance(answer.get("missing"), list):
                return [0]
            missing = answer["missing"]
        if lines and not missing:
            return []
    return [0]


def until_served(address: str, deadline: float) -> None:
    """Wait until jax's server listens; jax itself would try again only after a second."""
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(split_address(address), timeout=1).close()
            return
        time.sleep(0.01)


def _send(connection: socket.socket, **what: Any) -> None:
    with contextlib.suppress(OSError):  # whoever is gone is noticed when listened to
        connection.sendall(json.dumps(what).encode() + b"\n")


def _parse(line: bytes) -> dict[str, Any]:
    """Return what a line says, {} if it is not one of ours."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _close(sockets: Iterable[socket.socket]) -> None:
    for each in sockets:
        each.close()


def _named(ranks: list[int]) -> str:
    text = ", ".join(map(str, ranks[:_MOST_NAMED]))
    more = f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
    return f"process{'es' if len(ranks) > 1 else ''} {text}{more}"


def _clean(text: str, most: int) -> str:
    """Return what somebody else says so that it does nothing to a terminal, and not too much."""
    return "".join(c if c.isprintable() else "?" for c in text[:most])


def _cut(text: str) -> str:
    return text if len(text) < 400 else text[:400] + " ..."
