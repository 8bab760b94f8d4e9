"""Copying what the ranks of `txcore launch` write to our own streams, line by line."""

import contextlib
import os
import re
import select
import selectors
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from txcore.launch.launcher import hosts
from txcore.launch.launcher.hosts import Rank

_PIPE_BYTES = 2**20  # the most that a pipe holds, by Linux's fs.pipe-max-size
_LINE_BYTES = 2**24  # longer lines are broken
_LINE = re.compile(rb"[^\r\n]*(?:\r?\n|\r)")


@contextlib.contextmanager
def copied(ranks: Sequence[Rank], arrived: int) -> Iterator[Callable[[str], None]]:
    """Copy the ranks' lines to our own streams meanwhile; at the end, wait for the last ones.

    Yields what writes a line of our own to stderr. There is a thread for each stream, so that one
    that nobody reads holds up neither the other nor us.
    """
    out = _Writer(1)
    err = out if os.path.sameopenfile(1, 2) else _Writer(2)
    ended, end = os.pipe()
    outs = {rank.process.stdout: rank for rank in ranks if rank.process.stdout}
    errs = {rank.process.stderr: rank for rank in ranks if rank.process.stderr}
    threads = [
        threading.Thread(target=_copy, args=(pipes, writer, ended), daemon=True)
        for pipes, writer in ((outs, out), (errs, err))
    ]
    for thread in threads:
        thread.start()
    try:
        yield err.say
    finally:
        os.close(end)
        if _join(threads, arrived):
            os.close(ended)
            out.end()
            err.end()


def _join(threads: Sequence[threading.Thread], arrived: int) -> bool:
    """Wait for threads, or until we are not to: who reads our output may have stopped reading."""
    while any(thread.is_alive() for thread in threads):
        for thread in threads:
            thread.join(0.1)
        if {*hosts.read_signals(arrived, 0.0)} & {*hosts.STOPS}:
            return False
    return True


class _Writer:
    """One of our own streams, into which each rank's lines go whole."""

    def __init__(self, fd: int) -> None:
        self._fd, self._lock = fd, threading.Lock()
        self._returned: int | None = None  # whose line was ended by a carriage return

    def write(self, of: Rank, lines: Sequence[bytes]) -> None:
        if not lines:
            return
        of.hear(lines)
        rank = of.task.rank
        text = b"".join(b"[%d] %b" % (rank, line) for line in lines)
        with self._lock:
            if self._returned not in (None, rank):
                text = b"\n" + text  # another rank's progress stays to be seen
            self._returned = rank if text.endswith(b"\r") else None
            rest = memoryview(text)
            while rest:
                try:
                    rest = rest[os.write(self._fd, rest) :]
                except BlockingIOError:  # others may have made our terminal so
                    select.select([], [self._fd], [])

    def say(self, line: str) -> None:
        """Write a line of our own, unless nobody reads: who supervises must not wait."""
        if self._lock.acquire(timeout=1.0):
            self.end()
            with contextlib.suppress(OSError):
                if select.select([], [self._fd], [], 0)[1]:
                    os.write(self._fd, f"{line}\n".encode())
            self._lock.release()

    def end(self) -> None:
        """Begin a new line after a carriage return, on which progress would be overwritten."""
        if self._returned is not None:
            with contextlib.suppress(OSError):
                os.write(self._fd, b"\n")
        self._returned = None


def _copy(pipes: dict[IO[bytes], Rank], writer: _Writer, ended: int) -> None:
    """Copy lines from pipes of ranks until all are closed, or `ended` is and they are empty."""
    rests = {pipe: bytearray() for pipe in pipes}
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(ended, selectors.EVENT_READ)
            for pipe in pipes:
                selector.register(pipe, selectors.EVENT_READ)
            running = True
            while rests and running:
                ready = {key.fileobj for key, _ in selector.select()}
                running = ended not in ready
                for pipe in rests.keys() & ready:
                    chunk = os.read(pipe.fileno(), 2**16)
                    writer.write(pipes[pipe], lines(rests[pipe], chunk))
                    if not chunk:
                        selector.unregister(pipe)
                        del rests[pipe]
        for pipe, rest in rests.items():
            # Someone who has left the rank's process group holds it open still.
            os.set_blocking(pipe.fileno(), False)
            writer.write(pipes[pipe], lines(rest, pipe.read(_PIPE_BYTES) or b""))
            writer.write(pipes[pipe], lines(rest, b""))
    except OSError:
        pass  # nobody reads our output: the ranks are told so as we are, by closed pipes
    finally:
        for pipe in pipes:
            pipe.close()


def lines(rest: bytearray, chunk: bytes) -> list[bytes]:
    """Add a chunk to what is left of the one before, and take the whole lines; all at the end."""
    was_returned = rest.endswith(b"\r")
    rest += chunk
    found: list[bytes] = []
    if was_returned or b"\n" in chunk or b"\r" in chunk:
        # A return at the very end may belong to a line feed that has not come yet.
        size = 1 + max(rest.rfind(b"\n"), rest.rfind(b"\r", 0, len(rest) - 1))
        found = _LINE.findall(rest[:size])
        del rest[:size]
    if rest and (not chunk or len(rest) > _LINE_BYTES):
        found.append(bytes(rest) + b"\n")
        rest.clear()
    return [line for line in found if line != b"\r"]  # progress that begins with its return
