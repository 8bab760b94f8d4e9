"""Choose where the ranks of `txcore launch` run, and where their coordinator listens."""

import contextlib
import os
import pathlib
import random
import re
import socket
import sys
from collections.abc import Sequence

from txcore.cli.errors import BadInput

_HOST = r"(?:\w[\w.-]*@)?(?:\w[\w.-]*|\[[\da-fA-F:.]+\])"  # excludes what ssh takes for an option
_EPHEMERAL = pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST_PORT = 20000  # known services have the ports below


def place_ranks(size: int, hosts: str | None) -> list[str]:
    """Return the host of each rank, in order; "" for this one.

    Args:
      size: how many ranks there are.
      hosts: "A,B:4", each with its slots, the most ranks that it takes (1 by default if another
        host has slots); without any slots the ranks are spread evenly. None: all are here.

    Raises:
      BadInput: the text is not such a list, or has too few slots.

    Example:
      >>> from txcore.launch.launcher.placement import place_ranks
      >>> place_ranks(3, "a,b"), place_ranks(3, "a:1,localhost:4")
      (['a', 'a', 'b'], ['a', '', ''])
    """
    found = _parse_hosts(hosts or "localhost")
    limited = any(slots for _, slots in found)
    total = sum(slots or 1 for _, slots in found)
    if limited and total < size:
        raise BadInput(f"--hosts {hosts} has {total} slots, but -n asks for {size} ranks")
    each, more = divmod(size, len(found))
    even = [each + (i < more) for i in range(len(found))]
    sizes = [slots or 1 for _, slots in found] if limited else even
    ranks = [name for (name, _), count in zip(found, sizes, strict=True) for _ in range(count)]
    return ranks[:size]


def _parse_hosts(text: str) -> list[tuple[str, int | None]]:
    """Return each host's name, "" for this one, and its slots if given."""
    own = socket.gethostname()
    here = ("localhost", "127.0.0.1", "[::1]", own, own.partition(".")[0])
    found: list[tuple[str, int | None]] = []
    for part in text.split(","):
        match = re.fullmatch(rf"({_HOST})(?::0*([1-9]\d{{0,5}}))?", part, re.ASCII)
        if match is None:
            raise BadInput(f"--hosts needs hosts as in A,B or A:2,B:4, but got {text!r}")
        name = "" if match[1] in here else match[1]
        if name in [other for other, _ in found]:
            raise BadInput(f"--hosts needs each host once, as in A:4, but got {text!r}")
        found.append((name, int(match[2]) if match[2] else None))
    return found


def coordinator_variables(
    given: str | None, hosts: Sequence[str], held: contextlib.ExitStack
) -> dict[str, str]:
    """Return the variables that make rank 0 listen at one address; jax would listen on all.

    Args:
      given: --coordinator.
      hosts: of each rank, as `place_ranks` returns them.
      held: keeps the port from other launchers of this host until it is closed.

    Returns:
      The coordinator's address, and the address to bind.

    Raises:
      BadInput: rank 0 cannot listen there.
    """
    from txcore.launch.join import addresses

    others = [host for host in dict.fromkeys(hosts) if host]
    bind = None
    if given is not None:
        try:
            name, port = addresses.split_address(given)
        except ValueError:
            raise BadInput(f"--coordinator needs HOST:PORT, but got {given!r}") from None
        address = resolve_reachable(name, hosts)
        bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
        if not hosts[0] and not bind:
            _check_port(given, address, port)
    elif hosts[0]:
        address, port = resolve_reachable(hosts[0], hosts), random.choice(_candidate_ports())
    else:
        address = _own_address(others[0]) if others else "127.0.0.1"
        port = hold_port(address, held)
    chosen = addresses.join_address(address, port)
    return {
        "JAX_COORDINATOR_ADDRESS": given or chosen,
        "JAX_COORDINATOR_BIND_ADDRESS": bind or chosen,
    }


def resolve_reachable(host: str, hosts: Sequence[str] = ()) -> str:
    """Return a host's address; refuse one that not all of `hosts` can reach."""
    from txcore.launch.join import addresses

    name = host.rpartition("@")[2].strip("[]")
    try:
        address = addresses.resolve_host(name, 0)
    except (OSError, UnicodeError) as error:
        raise BadInput(
            f"host {name} does not resolve ({error}): name one that does, or give --coordinator "
            "and a --remote-shell that knows it"
        ) from error
    if len({*hosts}) > 1 and name != address and addresses.is_loopback(address):
        raise BadInput(
            f"{name} is {address} here, where other hosts do not reach it: give --coordinator with "
            "an address that they do"
        )
    return address


def _own_address(host: str) -> str:
    """Return the address of this host towards another."""
    from txcore.launch.join import addresses

    address = resolve_reachable(host)
    try:
        return addresses.address_towards(address, 9)
    except OSError as error:
        raise BadInput(f"there is no way to {host} ({error}): give --coordinator") from error


def _candidate_ports() -> list[int]:
    """Return the ports that the system does not hand out to connections by itself."""
    try:
        low, high = map(int, _EPHEMERAL.read_text().split())
    except (OSError, ValueError):
        low, high = 49152, 65535  # RFC 6335
    return [*range(_FIRST_PORT, low), *range(high + 1, 2**16)] or [*range(low, high + 1)]


def hold_port(address: str, held: contextlib.ExitStack) -> int:
    """Return a port at which nobody listens; on Linux, hold it against other launchers.

    Rank 0 can still listen there: a bound socket that does not listen blocks only sockets that do
    not share the port. (jax shares its port with every other coordinator of the same user.)
    """
    ports = _candidate_ports()
    for port in random.sample(ports, min(len(ports), 100)):
        holder = held.enter_context(_make_socket(address))
        try:
            holder.bind((address, port))
        except OSError:
            holder.close()
            continue
        if sys.platform == "linux":
            for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
                holder.setsockopt(socket.SOL_SOCKET, option, 1)
        else:
            holder.close()
        return port
    raise BadInput(f"no port of {address} is free: give --coordinator")


def _check_port(given: str, address: str, port: int) -> None:
    with _make_socket(address) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise BadInput(
                f"--coordinator {given}: rank 0 cannot listen there ({error.strerror})"
            ) from error


def _make_socket(address: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
