"""The processes of a run meet before jax joins them, and learn which ones are missing.

jax's own join aborts the process without naming the missing one (SIGABRT, "Deadline Exceeded", on
0.10 to 0.12), and admits any process that connects. So the processes first meet at the
coordinator's port: each connects to process 0 (gathering.py) and sends its rank and run, and
process 0 tells all of them who is missing until nobody is. Both ends stay connected until jax has
joined them, so that a process joins the same process 0 that it has met.
"""

import contextlib
import json
import math
import secrets
import select
import socket
import time
from typing import Any, NamedTuple

from txcore.errors import TxcoreError
from txcore.launch.join.addresses import split_address

# The id of the run that a process belongs to; `txcore launch` sets a new one for each run.
RUN_VARIABLE = "TXCORE_RUN"
ATTEMPTS = 3  # to listen at a port that another program still has
_LONGEST_LINE = 2**16  # bytes; every message is far shorter
PATIENCE_S = 5.0  # for another run that has the port to end
_ASK_S = 2.0  # for whoever has the port to answer
_MOST_NAMED = 16  # processes in a message


class NotTogether(TxcoreError, RuntimeError):
    """The processes of a run did not all meet; the message says which and what to do."""


class _Refused(NotTogether):
    """Another run has the port, for now."""


class Seat(NamedTuple):
    """Hold a process's connection to process 0 after the meeting, and the token of this start."""

    connection: socket.socket
    token: str


def make_greeting(rank: int, size: int, run: str | None = None) -> dict[str, Any]:
    """Return the message by which a process introduces itself at the meeting."""
    own = {"process": secrets.token_hex(8), "host": socket.gethostname()}
    return {"txcore": 1, "rank": rank, "size": size, "run": run, **own}


def listen_alone(
    address: str, deadline: float, greeting: dict[str, Any] | None = None
) -> socket.socket:
    """Return a socket that listens at "host:port" exclusively; try three times.

    jax's own server shares its port with other programs of the same user that listen there, and
    each gets a part of the ranks.

    Args:
      address: where to listen.
      deadline: by time.monotonic(), after which there is no further attempt.
      greeting: of this process, sent to whoever has the port to learn who that is.

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
    there = _ask_who_listens(address, greeting) if greeting else ""
    raise NotTogether(
        f"process 0 needs to listen on {address}, but cannot ({reason}{there}): end what "
        "listens there (a second process 0? another run?), or take another port "
        "(JAX_COORDINATOR_PORT, coordinator=, or --coordinator of txcore launch); if it is not an "
        "address of this host, start process 0 on the coordinator's host, or set "
        "JAX_COORDINATOR_BIND_ADDRESS"
    )


def _ask_who_listens(address: str, greeting: dict[str, Any]) -> str:
    """Ask the program that has a port; return its answer if it is the process 0 of some run."""
    try:
        with socket.create_connection(split_address(address), timeout=_ASK_S) as connection:
            _wait_for_others(connection, greeting, time.monotonic() + _ASK_S - 1)
    except NotTogether as error:
        return f"; {error}"
    except OSError:
        pass
    return ""


def join_meeting(
    address: str, rank: int, size: int, deadline: float, run: str | None = None
) -> Seat:
    """Connect to process 0, and wait until all processes have joined the meeting.

    Args:
      address: "host:port" of the coordinator.
      rank: the number of this process.
      size: the number of processes.
      deadline: by time.monotonic().
      run: the run's id; None without one (`launch.cluster`).

    Returns:
      The seat, to be kept until jax has joined this process.

    Raises:
      NotTogether: a process did not join in time or contradicts another one, or another run has
        the port.
    """
    greeting = make_greeting(rank, size, run)
    pause, missing, reason = 0.05, [0], "nothing tried"
    refused, until = "", math.inf
    while (left := min(deadline, until) - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(split_address(address), timeout=min(left, 10))
        except (OSError, UnicodeError) as error:  # UnicodeError: an invalid name
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            refused, until = "", math.inf  # that run is over
        else:
            try:
                # After many attempts a socket may connect to itself: both ends have the port.
                if connection.getsockname() != connection.getpeername():
                    missing, token = _wait_for_others(connection, greeting, deadline)
                    if token:
                        return Seat(connection, token)
                    reason = "who answers there waits for no process of this run"
                connection.close()
            except _Refused as error:
                connection.close()
                refused, until = str(error), min(until, time.monotonic() + PATIENCE_S)
            except BaseException:
                connection.close()
                raise
        time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        pause = min(2 * pause, 2.0)
    if refused:
        raise NotTogether(refused)
    if 0 in missing:
        raise NotTogether(f"process 0 did not come: it does not answer at {address} ({reason})")
    raise NotTogether(f"{name_processes(missing)} did not come")


def _wait_for_others(
    connection: socket.socket, greeting: dict[str, Any], deadline: float
) -> tuple[list[int], str]:
    """Greet process 0, and wait; return the missing ranks, and the start's token if there are none.

    Returns [0] where the other end is not process 0, or is gone. Waits a second longer than the
    deadline, since process 0 names who is missing when its own is over.
    """
    missing, said = [0], b""
    send_line(connection, **greeting)
    while len(said) < _LONGEST_LINE:
        connection.settimeout(max(0.1, deadline + 1 - time.monotonic()))
        try:
            data = connection.recv(_LONGEST_LINE)
        except TimeoutError:
            return missing, ""
        except OSError:
            return [0], ""
        if not data:
            return [0], ""
        *lines, said = (said + data).split(b"\n")
        for answer in map(parse_line, lines):
            if isinstance(answer.get("error"), str):
                kind = _Refused if answer.get("again") is True else NotTogether
                raise kind(clean_text(answer["error"], 2000))
            if not isinstance(answer.get("missing"), list):
                return [0], ""
            missing = answer["missing"]
            if not missing and isinstance(answer.get("token"), str):
                return [], answer["token"]
    return [0], ""


def wait_until_served(address: str, deadline: float, seat: Seat) -> None:
    """Wait until jax's server listens; jax itself would try again only after a second.

    Raises:
      NotTogether: process 0 has ended, so the listener is another program.
    """
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(split_address(address), timeout=1).close()
            break
        time.sleep(0.01)
    if select.select([seat.connection], [], [], 0)[0]:  # no more messages come: it is closed
        raise NotTogether("process 0 ended after all had met: see what it says")


def tell_of_end(address: str, run: str, rank: int, code: int) -> bool:
    """Report to process 0 that a rank has ended; tell whether it has received the report.

    Args:
      address: "host:port" of the coordinator.
      run: the run's id.
      rank: which one has ended.
      code: its exit code, -n for signal n.
    """
    try:
        with socket.create_connection(split_address(address), timeout=1.0) as connection:
            send_line(connection, txcore=1, rank=rank, run=run, ended=code)
            return b'"heard"' in connection.recv(_LONGEST_LINE)
    except (OSError, UnicodeError):
        return False


def send_line(connection: socket.socket, **what: Any) -> None:
    """Send a message as one line of JSON."""
    with contextlib.suppress(OSError):  # the next recv notices a closed connection
        connection.sendall(json.dumps(what).encode() + b"\n")


def parse_line(line: bytes) -> dict[str, Any]:
    """Return the message in a line, {} if it is not one of ours."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def name_processes(ranks: list[int]) -> str:
    """Return "process 1" or "processes 1, 2"; many are cut."""
    text = ", ".join(map(str, ranks[:_MOST_NAMED]))
    more = f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
    return f"process{'es' if len(ranks) > 1 else ''} {text}{more}"


def clean_text(text: str, most: int) -> str:
    """Return printable text of at most so many characters from an untrusted one."""
    return "".join(c if c.isprintable() else "?" for c in text[:most])


def cut_text(text: str) -> str:
    """Return a text cut to 400 characters."""
    return text if len(text) < 400 else text[:400] + " ..."
