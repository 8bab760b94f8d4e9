"""Process 0's part of the meeting: admit the other processes, then answer newcomers."""

import contextlib
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from txcore.launch.join import seal_port
from txcore.launch.join.rendezvous import (
    NotTogether,
    clean_text,
    cut_text,
    name_processes,
    parse_line,
    send_line,
)
from txcore.launch.watch.status import how_ended

_LONGEST_LINE = 2**16  # bytes; every message is far shorter
_STRANGERS = 256  # connections kept that have not identified themselves
# Without a run id, a process that contradicts this run may belong to another run or be the missing
# one. The missing one cannot join any more, so the others wait no longer than this.
DOUBT_S = 25.0
THREAD = "txcore-port"  # as the watch's threads, which are left out of stacks

# Called with the number and the exit code of a rank that has ended, -n for signal n.
OnEnd = Callable[[int, int], object]


class Host:
    """Admit the other processes on process 0 until all have come; then answer at the port.

    Args:
      listener: from `listen_alone`.
      size: the number of processes.
      name: the name of this host.
      run: the run's id; None without one (`launch.cluster`).
    """

    def __init__(
        self, listener: socket.socket, size: int, name: str, run: str | None = None
    ) -> None:
        self._listener, self._size, self._run = listener, size, run
        self._names = {0: name}
        self._there: dict[int, socket.socket] = {}
        self._processes: dict[int, Any] = {}  # tells two processes with one number apart
        self._strangers: dict[socket.socket, bytes] = {}  # with what each has sent so far
        self._announced: Any = None
        self._announce_again_at = 0.0
        self._complete = False
        self._doubt, self._doubted_until = "", float("inf")
        self._on_end: OnEnd = lambda rank, code: None
        # Names this start: shows later whether all that joined jax's service were at the meeting.
        self.token = secrets.token_hex(8)

    def missing_ranks(self) -> list[int]:
        """Return the processes that have not joined."""
        return [rank for rank in range(1, self._size) if rank not in self._there]

    def gather_all(self, deadline: float) -> None:
        """Wait until all have joined, and tell them so; call `answer_newcomers` or `close` next.

        Raises:
          NotTogether: a process did not join in time, or cannot join any more.
        """
        try:
            with selectors.DefaultSelector() as selector:
                self._listener.setblocking(False)
                selector.register(self._listener, selectors.EVENT_READ)
                while missing := self.missing_ranks():
                    self._announce_missing(missing)
                    left = min(deadline, self._doubted_until) - time.monotonic()
                    if left <= 0:
                        raise NotTogether(self._describe_missing(missing))
                    for key, _ in selector.select(min(left, 0.5)):
                        self._read_connection(key.fileobj, selector)
        except BaseException as error:
            self._send_all(error=str(error) or "process 0 was stopped")
            self._listener.close()
            self.close()
            raise
        self._complete = True
        _close_all(self._strangers)
        self._strangers.clear()
        # Before the others go on: only jax's server may take the port, no other run.
        seal_port.hold_port(self._listener)
        self._send_all(missing=[], token=self.token)

    def close(self) -> None:
        """Close the port and all connections."""
        _close_all([self._listener, *self._there.values(), *self._strangers])

    def answer_newcomers(self, port: int, on_end: OnEnd) -> bool:
        """Refuse newcomers at the port from now on, in a thread; jax's service runs there.

        Args:
          port: jax's.
          on_end: called when the launcher reports that a rank has ended.

        Returns:
          Whether strangers are kept from jax's service, which only Linux allows.
        """
        self.close()
        self._on_end = on_end
        closed, listener = seal_port.take_over_port(port)
        if listener is not None:
            self._listener = listener
            threading.Thread(target=self._keep_answering, daemon=True, name=THREAD).start()
        return closed

    def _keep_answering(self) -> None:
        with selectors.DefaultSelector() as selector:
            self._listener.setblocking(False)
            selector.register(self._listener, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    self._read_connection(key.fileobj, selector)

    def _read_connection(self, connection: Any, selector: selectors.BaseSelector) -> None:
        """Accept a newcomer, read a message, or notice that a process is gone."""
        if connection is self._listener:
            with contextlib.suppress(OSError):
                newcomer, _ = connection.accept()
                newcomer.setblocking(False)
                self._strangers[newcomer] = b""
                selector.register(newcomer, selectors.EVENT_READ)
            if len(self._strangers) > _STRANGERS + self._size:
                self._drop_connection(next(iter(self._strangers)), selector)
            return
        if connection.fileno() < 0:  # dropped after select returned it
            return
        try:
            data = connection.recv(_LONGEST_LINE)
        except OSError:
            data = b""
        said = self._strangers.get(connection, b"") + data
        if not data or connection not in self._strangers or len(said) > _LONGEST_LINE:
            self._drop_connection(connection, selector)
        elif said.endswith(b"\n"):
            self._admit_newcomer(connection, said, selector)
        else:
            self._strangers[connection] = said

    def _admit_newcomer(
        self, connection: Any, said: bytes, selector: selectors.BaseSelector
    ) -> None:
        """Admit a newcomer as the process that it claims to be, or refuse it."""
        greeting = parse_line(said)
        rank, size, name = (greeting.get(key) for key in ("rank", "size", "host"))
        if type(rank) is int and type(greeting.get("ended")) is int:
            self._hear_of_an_end(connection, greeting)
            self._drop_connection(connection, selector)
            return
        if type(rank) is not int or type(size) is not int or not isinstance(name, str):
            self._drop_connection(connection, selector)
            return
        run, name = greeting.get("run"), clean_text(name, 64)
        process = greeting.get("process")
        if process and not self._complete and self._is_again(rank, process):
            self._drop_connection(self._there[rank], selector)  # its first connection broke
        error = self._why_refused(rank, size, name, run)
        if error is None:
            del self._strangers[connection]
            self._there[rank], self._names[rank] = connection, name
            self._processes[rank] = process
            return
        # The port may become free: a process of another run tries again for a moment.
        send_line(connection, error=error, again=self._complete or run != self._run)
        self._drop_connection(connection, selector)
        if self._complete or run != self._run:
            return
        if self._run is not None:
            raise NotTogether(error)
        self._doubt = error
        self._doubted_until = min(self._doubted_until, time.monotonic() + DOUBT_S)

    def _is_again(self, rank: int, process: Any) -> bool:
        return rank in self._there and self._processes.get(rank) == process

    def _why_refused(self, rank: int, size: int, name: str, run: Any) -> str | None:
        """Return why a newcomer is refused; None if it is admitted."""
        if run != self._run:
            return (
                f"the port is that of {_name_run(self._run)} (process 0 on {self._names[0]}), "
                f"and process {rank} (on {name}) is of {_name_run(run)}: give each run a port of "
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
        """Note that a rank has ended, as the launcher reports, which knows the run's id."""
        rank, code = greeting["rank"], greeting["ended"]
        if self._run is None or greeting.get("run") != self._run or not 0 <= rank < self._size:
            return
        send_line(connection, heard=True)
        if not self._complete:
            raise NotTogether(
                f"process {rank} {how_ended(code)} before all had met: see what it says, and "
                "have every process call tx.initialize"
            )
        self._on_end(rank, code)

    def _drop_connection(self, connection: Any, selector: selectors.BaseSelector) -> None:
        """Forget a connection and its process."""
        selector.unregister(connection)
        connection.close()
        self._strangers.pop(connection, None)
        for rank in [rank for rank, c in self._there.items() if c is connection]:
            del self._there[rank]

    def _announce_missing(self, missing: list[int]) -> None:
        """Tell all that have joined who is missing, when that changes, but not too often."""
        now, news = time.monotonic(), (tuple(missing), tuple(sorted(self._there)))
        if news != self._announced and now >= self._announce_again_at:
            self._send_all(missing=missing)
            self._announced, self._announce_again_at = news, now + self._size / 1000

    def _send_all(self, **what: Any) -> None:
        for connection in self._there.values():
            send_line(connection, **what)

    def _describe_missing(self, missing: list[int]) -> str:
        never = [rank for rank in missing if rank not in self._names]
        gone = [rank for rank in missing if rank in self._names]
        here = ", ".join(f"{rank} on {self._names[rank]}" for rank in sorted({0, *self._there}))
        what = [f"{name_processes(never)} did not come"] if never else []
        what += [f"{name_processes(gone)} came and ended again"] if gone else []
        refused = f"; refused was one that may be it: {self._doubt}" if self._doubt else ""
        return f"{' and '.join(what)} (here: {cut_text(here)}){refused}"


def _name_run(run: Any) -> str:
    return "a run without an id" if run is None else f"run {clean_text(str(run), 64)}"


def _close_all(sockets: Iterable[socket.socket]) -> None:
    for each in sockets:
        each.close()
