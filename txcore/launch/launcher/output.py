"""Copy what the ranks of `txcore launch` write to our own streams, line by line."""

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
def copy_output(ranks: Sequence[Rank], arrived: int) -> Iterator[Callable[[str], None]]:
    """Copy the ranks' lines to our own streams inside this context; at its end, wait for the last.

    Yields a function that writes a line of our own to stderr. Each stream has a thread, so that a
    stream that nobody reads blocks neither the other nor us.
    """
    out = _Writer(1)
    err = out if os.path.sameopenfile(1, 2) else _Writer(2)
    ended, end = os.pipe()
    outs = {rank.process.stdout: rank for rank in ranks if rank.process.stdout}
    errs = {rank.process.stderr: rank for rank in ranks if rank.process.stderr}
    threads = [
        threading.Thread(target=_copy_pipes, args=(pipes, writer, ended), daemon=True)
        for pipes, writer in ((outs, out), (errs, err))
    ]
    for thread in threads:
        thread.start()
    try:
        yield err.write_own_line
    finally:
        os.close(end)
        if _join_threads(threads, arrived):
            os.close(ended)
            out.end_line()
            err.end_line()


def _join_threads(threads: Sequence[threading.Thread], arrived: int) -> bool:
    """Wait for threads, or for a signal: the reader of our output may have stopped reading."""
    while any(thread.is_alive() for thread in threads):
        for thread in threads:
            thread.join(0.1)
        if {*hosts.read_signals(arrived, 0.0)} & {*hosts.STOPS}:
            return False
    return True


class _Writer:
    """Write whole lines of the ranks to one of our own streams."""

    def __init__(self, fd: int) -> None:
        self._fd, self._lock = fd, threading.Lock()
        self._returned: int | None = None  # the rank whose line ended with a carriage return

    def write_lines(self, of: Rank, lines: Sequence[bytes]) -> None:
        if not lines:
            return
        of.keep_words(lines)
        rank = of.task.rank
        text = b"".join(b"[%d] %b" % (rank, line) for line in lines)
        with self._lock:
            if self._returned not in (None, rank):
                text = b"\n" + text  # keeps another rank's progress visible
            self._returned = rank if text.endswith(b"\r") else None
            rest = memoryview(text)
            while rest:
                try:
                    rest = rest[os.write(self._fd, rest) :]
                except BlockingIOError:  # another program may have made our terminal non-blocking
                    select.select([], [self._fd], [])

    def write_own_line(self, line: str) -> None:
        """Write a line of our own, unless nobody reads: the supervisor must not block."""
        if self._lock.acquire(timeout=1.0):
            self.end_line()
            with contextlib.suppress(OSError):
                if select.select([], [self._fd], [], 0)[1]:
                    os.write(self._fd, f"{line}\n".encode())
            self._lock.release()

    def end_line(self) -> None:
        """Begin a new line after a carriage return, so that progress is not overwritten."""
        if self._returned is not None:
            with contextlib.suppress(OSError):
                os.write(self._fd, b"\n")
        self._returned = None


def _copy_pipes(pipes: dict[IO[bytes], Rank], writer: _Writer, ended: int) -> None:
    """Copy lines from the ranks' pipes until all are closed, or `ended` is and they are empty."""
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
                    writer.write_lines(pipes[pipe], lines(rests[pipe], chunk))
                    if not chunk:
                        selector.unregister(pipe)
                        del rests[pipe]
        for pipe, rest in rests.items():
            # A process that has left the rank's process group may still hold it open.
            os.set_blocking(pipe.fileno(), False)
            writer.write_lines(pipes[pipe], lines(rest, pipe.read(_PIPE_BYTES) or b""))
            writer.write_lines(pipes[pipe], lines(rest, b""))
    except OSError:
        pass  # nobody reads our output: closing the pipes tells the ranks so
    finally:
        for pipe in pipes:
            pipe.close()


def lines(rest: bytearray, chunk: bytes) -> list[bytes]:
    """Add a chunk to the rest of the one before, and take its whole lines; b"" ends the last."""
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
