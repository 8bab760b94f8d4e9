"""Process 0's part of the meeting: it takes in the others, and answers whoever comes later."""

import contextlib
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from txcore.launch.join import seal_port
from txcore.launch.join.rendezvous import NotTogether, clean, cut, named, parse, send
from txcore.launch.watch.status import how_ended

_LONGEST_LINE = 2**16  # bytes; nobody has more to say
_STRANGERS = 256  # connections that said nothing yet and are kept
# Where a run has no id, whoever contradicts it may be of another run, or the one that is missing:
# the latter cannot come any more, and the others wait no longer than this.
DOUBT_S = 25.0
THREAD = "txcore-door"  # as the watch's threads, which are left out of stacks

# Told of a rank that has ended: its number and its exit code, -n by signal n.
OnEnd = Callable[[int, int], object]


class Host:
    """Process 0: takes in the others until all are there, and is the port's voice after that.

    Args:
      listener: from `listen`.
      size: how many processes there are.
      name: of this host.
      run: the run's id, None where nothing gave it one (`launch.cluster`).
    """

    def __init__(
        self, listener: socket.socket, size: int, name: str, run: str | None = None
    ) -> None:
        self._listener, self._size, self._run = listener, size, run
        self._names = {0: name}
        self._there: dict[int, socket.socket] = {}
        self._processes: dict[int, Any] = {}  # what tells two processes of one number apart
        self._strangers: dict[socket.socket, bytes] = {}  # and what each has said so far
        self._told: Any = None
        self._tell_again = 0.0
        self._complete = False
        self._doubt, self._doubted_until = "", float("inf")
        self._on_end: OnEnd = lambda rank, code: None
        # Of this start: who has met and who has joined jax's own service can be compared by it.
        self.token = secrets.token_hex(8)

    def missing(self) -> list[int]:
        """Return the processes that have not come."""
        return [rank for rank in range(1, self._size) if rank not in self._there]

    def gather(self, deadline: float) -> None:
        """Wait until all have come, and tell them so; `stay` or `close` comes next.

        Raises:
          NotTogether: not all have come in time, or one of this run cannot come any more.
        """
        try:
            with selectors.DefaultSelector() as selector:
                self._listener.setblocking(False)
                selector.register(self._listener, selectors.EVENT_READ)
                while missing := self.missing():
                    self._tell(missing)
                    left = min(deadline, self._doubted_until) - time.monotonic()
                    if left <= 0:
                        raise NotTogether(self._did_not_come(missing))
                    for key, _ in selector.select(min(left, 0.5)):
                        self._hear(key.fileobj, selector)
        except BaseException as error:
            self._send_all(error=str(error) or "process 0 was stopped")
            self._listener.close()
            self.close()
            raise
        self._complete = True
        _close(self._strangers)
        self._strangers.clear()
        # Before the others go on: jax's server is to have the port, and no other run in between.
        seal_port.hold(self._listener)
        self._send_all(missing=[], token=self.token)

    def close(self) -> None:
        """Let go of the port and of the others."""
        _close([self._listener, *self._there.values(), *self._strangers])

    def stay(self, port: int, on_end: OnEnd) -> bool:
        """Refuse whoever comes to the port from now on, in a thread; jax's service runs there.

        Args:
          port: jax's.
          on_end: called where the launcher says that a rank has ended.

        Returns:
          Whether no stranger reaches jax's service; not on other systems than Linux.
        """
        self.close()
        self._on_end = on_end
        closed, listener = seal_port.take(port)
        if listener is not None:
            self._listener = listener
            threading.Thread(target=self._answer, daemon=True, name=THREAD).start()
        return closed

    def _answer(self) -> None:
        with selectors.DefaultSelector() as selector:
            self._listener.setblocking(False)
            selector.register(self._listener, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    self._hear(key.fileobj, selector)

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
        greeting = parse(said)
        rank, size, name = (greeting.get(key) for key in ("rank", "size", "host"))
        if type(rank) is int and type(greeting.get("ended")) is int:
            self._hear_of_an_end(connection, greeting)
            self._drop(connection, selector)
            return
        if type(rank) is not int or type(size) is not int or not isinstance(name, str):
            self._drop(connection, selector)
            return
        run, name = greeting.get("run"), clean(name, 64)
        process = greeting.get("process")
        if process and not self._complete and self._is_again(rank, process):
            self._drop(self._there[rank], selector)  # its first connection broke
        error = self._refusal(rank, size, name, run)
        if error is None:
            del self._strangers[connection]
            self._there[rank], self._names[rank] = connection, name
            self._processes[rank] = process
            return
        # The port may become free: who comes of another run looks again for a moment.
        send(connection, error=error, again=self._complete or run != self._run)
        self._drop(connection, selector)
        if self._complete or run != self._run:
            return
        if self._run is not None:
            raise NotTogether(error)
        self._doubt = error
        self._doubted_until = min(self._doubted_until, time.monotonic() + DOUBT_S)

    def _is_again(self, rank: int, process: Any) -> bool:
        return rank in self._there and self._processes.get(rank) == process

    def _refusal(self, rank: int, size: int, name: str, run: Any) -> str | None:
        """Return why a newcomer is not taken in; None where it is."""
        if run != self._run:
            return (
                f"the port is that of {_run_named(self._run)} (process 0 on {self._names[0]}), "
                f"and process {rank} (on {name}) is of {_run_named(run)}: give each run a port of "
                "its own, and all processes of a run the same TXCORE_RUN or none"
            )
        if size != self._size:
            return (
                f"process {rank} (on {name}) was started with num_processes={size}, but "
                f"process 0 (on {self._names[0]}) with {self._size}: give all the same"
            )
        if not 0 < rank < size or rank in self._there:
            other = ", and each run a port of its own" if self._run is None else ""
            return (
                f"process_id={rank} is taken by a process on {self._names.get(rank, '?')}, and "
                f"another on {name} has it too: give each its own, from 0 to {size - 1}{other}"
            )
        return None

    def _hear_of_an_end(self, connection: Any, greeting: dict[str, Any]) -> None:
        """Take in that a rank has ended: the launcher says so, which alone knows the run's id."""
        rank, code = greeting["rank"], greeting["ended"]
        if self._run is None or greeting.get("run") != self._run or not 0 <= rank < self._size:
            return
        send(connection, heard=True)
        if not self._complete:
            raise NotTogether(
                f"process {rank} {how_ended(code)} before all had met: see what it says, and "
                "have every process call tx.initialize"
            )
        self._on_end(rank, code)

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
            send(connection, **what)

    def _did_not_come(self, missing: list[int]) -> str:
        never = [rank for rank in missing if rank not in self._names]
        gone = [rank for rank in missing if rank in self._names]
        here = ", ".join(f"{rank} on {self._names[rank]}" for rank in sorted({0, *self._there}))
        what = [f"{named(never)} did not come"] if never else []
        what += [f"{named(gone)} came and ended again"] if gone else []
        refused = f"; refused was one that may be it: {self._doubt}" if self._doubt else ""
        return f"{' and '.join(what)} (here: {cut(here)}){refused}"


def _run_named(run: Any) -> str:
    return "a run without an id" if run is None else f"run {clean(str(run), 64)}"


def _close(sockets: Iterable[socket.socket]) -> None:
    for each in sockets:
        each.close()
