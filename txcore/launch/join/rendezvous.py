"""The processes of a run meet before jax joins them: who is there, and who is missing.

jax's own join ends the process without a chance and without a name when one does not come (SIGABRT,
"Deadline Exceeded", on 0.10 to 0.12), and takes in whoever comes. So they meet at the coordinator's
port first: each connects to process 0 (gathering.py) and says who it is and of which run, and
process 0 tells them who is missing until nobody is. Both ends stay connected until jax has joined
them, so that who reaches the port then reaches the process 0 that it has met.
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

# Says which run a process belongs to; `txcore launch` sets it, anew for each run.
RUN_VARIABLE = "TXCORE_RUN"
ATTEMPTS = 3  # to listen where another program listens still
_LONGEST_LINE = 2**16  # bytes; nobody has more to say
PATIENCE_S = 5.0  # for a run that has the port, and may be about to end
_ASK_S = 2.0  # for an answer of who has the port
_MOST_NAMED = 16  # processes in a message


class NotTogether(TxcoreError, RuntimeError):
    """The processes of a run did not come together; the message says which and what to do."""


class _Refused(NotTogether):
    """Another run has the port, for now."""


class Seat(NamedTuple):
    """What a process has once all have met: its connection to process 0, and the start's token."""

    connection: socket.socket
    token: str


def introduce(rank: int, size: int, run: str | None = None) -> dict[str, Any]:
    """Return what a process says of itself at the meeting."""
    own = {"process": secrets.token_hex(8), "host": socket.gethostname()}
    return {"txcore": 1, "rank": rank, "size": size, "run": run, **own}


def listen(address: str, deadline: float, greeting: dict[str, Any] | None = None) -> socket.socket:
    """Return a socket that listens at "host:port", alone; it may take three attempts.

    jax's own server shares its port with whoever of the same user listens there as well, and each
    gets a part of the ranks.

    Args:
      address: where to listen.
      deadline: by time.monotonic(), when there is no further attempt.
      greeting: of this process, with which whoever has the port is asked who it is.

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
    there = _who_has(address, greeting) if greeting else ""
    raise NotTogether(
        f"process 0 must listen on {address}, but cannot ({reason}{there}): end what "
        "listens there (a second process 0? another run?), or take another port "
        "(JAX_COORDINATOR_PORT, coordinator=, or --coordinator of txcore launch); if it is not an "
        "address of this host, start process 0 on the coordinator's host, or set "
        "JAX_COORDINATOR_BIND_ADDRESS"
    )


def _who_has(address: str, greeting: dict[str, Any]) -> str:
    """Return what the process 0 that has a port says to another one, if it is one."""
    try:
        with socket.create_connection(split_address(address), timeout=_ASK_S) as connection:
            _wait(connection, greeting, time.monotonic() + _ASK_S - 1)
    except NotTogether as error:
        return f"; {error}"
    except OSError:
        pass
    return ""


def attend(address: str, rank: int, size: int, deadline: float, run: str | None = None) -> Seat:
    """Tell process 0 that this one is here, and wait until all are.

    Args:
      address: "host:port" of the coordinator.
      rank: which process this is.
      size: how many there are.
      deadline: by time.monotonic().
      run: the run's id, None where nothing gave it one (`launch.cluster`).

    Returns:
      What to keep until jax has joined this process.

    Raises:
      NotTogether: process 0 or another one did not come in time, or does not agree, or the port is
        that of another run.
    """
    greeting = introduce(rank, size, run)
    pause, missing, reason = 0.05, [0], "nothing tried"
    refused, until = "", math.inf
    while (left := min(deadline, until) - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(split_address(address), timeout=min(left, 10))
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that cannot be one
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            refused, until = "", math.inf  # that run is over
        else:
            try:
                # Somebody who waits long may be connected to itself: both ends have the port.
                if connection.getsockname() != connection.getpeername():
                    missing, token = _wait(connection, greeting, deadline)
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
    raise NotTogether(f"{named(missing)} did not come")


def _wait(
    connection: socket.socket, greeting: dict[str, Any], deadline: float
) -> tuple[list[int], str]:
    """Greet process 0; return who is missing in the end, and the start's token where nobody is.

    [0] is missing if it is not process 0 or is gone. The deadline of process 0 may be a little
    later: it is to say who is missing.
    """
    missing, said = [0], b""
    send(connection, **greeting)
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
        for answer in map(parse, lines):
            if isinstance(answer.get("error"), str):
                kind = _Refused if answer.get("again") is True else NotTogether
                raise kind(clean(answer["error"], 2000))
            if not isinstance(answer.get("missing"), list):
                return [0], ""
            missing = answer["missing"]
            if not missing and isinstance(answer.get("token"), str):
                return [], answer["token"]
    return [0], ""


def until_served(address: str, deadline: float, seat: Seat) -> None:
    """Wait until jax's server listens; jax itself would try again only after a second.

    Raises:
      NotTogether: process 0 ended meanwhile; who listens then is another one.
    """
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(split_address(address), timeout=1).close()
            break
        time.sleep(0.01)
    if select.select([seat.connection], [], [], 0)[0]:  # it says nothing more: it is closed
        raise NotTogether("process 0 ended after all had met: see what it says")


def tell_of_end(address: str, run: str, rank: int, code: int) -> bool:
    """Tell process 0 that a rank has ended, which waits for it; tell whether it has heard.

    Args:
      address: "host:port" of the coordinator.
      run: the run's id.
      rank: which one has ended.
      code: its exit code, -n by signal n.
    """
    try:
        with socket.create_connection(split_address(address), timeout=1.0) as connection:
            send(connection, txcore=1, rank=rank, run=run, ended=code)
            return b'"heard"' in connection.recv(_LONGEST_LINE)
    except (OSError, UnicodeError):
        return False


def send(connection: socket.socket, **what: Any) -> None:
    """Write what one says to the other as a line."""
    with contextlib.suppress(OSError):  # whoever is gone is noticed when listened to
        connection.sendall(json.dumps(what).encode() + b"\n")


def parse(line: bytes) -> dict[str, Any]:
    """Return what a line says, {} if it is not one of ours."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def named(ranks: list[int]) -> str:
    """Return "process 1" or "processes 1, 2"; many are cut."""
    text = ", ".join(map(str, ranks[:_MOST_NAMED]))
    more = f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
    return f"process{'es' if len(ranks) > 1 else ''} {text}{more}"


def clean(text: str, most: int) -> str:
    """Return what somebody else says so that it does nothing to a terminal, and not too much."""
    return "".join(c if c.isprintable() else "?" for c in text[:most])


def cut(text: str) -> str:
    """Return a text that is not too long."""
    return text if len(text) < 400 else text[:400] + " ..."
