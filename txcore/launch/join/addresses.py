"""Resolve the addresses and check the interfaces of a run's processes; bypass proxies."""

import os
import re
import socket
from collections.abc import Iterable, Mapping, MutableMapping

_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # as gRPC reads them, in this order


def split_address(text: str) -> tuple[str, int]:
    """Return the host and the port of "host:port"; an IPv6 address stands in brackets.

    Raises:
      ValueError: the text does not have that form.

    Example:
      >>> from txcore.launch.join.addresses import split_address
      >>> split_address("[::1]:12345")
      ('::1', 12345)
    """
    found = re.fullmatch(r"(\[[^]]+\]|[^:\[\]]+):(\d{1,5})", text)
    if found is None or not 0 < int(found[2]) < 2**16:
        raise ValueError(
            f"split_address needs 'host:port', got {text!r}: write an IPv6 host as '[::1]:12345'"
        )
    return found[1].strip("[]"), int(found[2])


def join_address(host: str, port: int) -> str:
    """Return "host:port", an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def resolve_host(host: str, port: int) -> str:
    """Return the IP address of a host, preferably an IPv4 one.

    Raises:
      OSError: the host is unknown.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    found.sort(key=lambda row: row[0] != socket.AF_INET)
    return str(found[0][4][0])


def is_loopback(address: str) -> bool:
    """Tell whether an IP address is this host's own, which no other host can reach."""
    return address.startswith("127.") or address == "::1"


def address_towards(host: str, port: int) -> str:
    """Return this host's address on the way to another; nothing is sent."""
    where = resolve_host(host, port)
    family = socket.AF_INET6 if ":" in where else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((where, port))
        return str(probe.getsockname()[0])


def bypass_proxies(host: str, environ: MutableMapping[str, str]) -> None:
    """Exclude the coordinator from gRPC's proxies: through one, jax's join hangs.

    Only gRPC reads no_grpc_proxy, which takes precedence over no_proxy.
    """
    if any(environ.get(name) for name in _PROXIES):
        before = environ.get("no_grpc_proxy") or environ.get("no_proxy")
        environ["no_grpc_proxy"] = f"{before},{host}" if before else host


def check_interfaces(
    environ: Mapping[str, str] | None = None, interfaces: Iterable[str] | None = None
) -> None:
    """Refuse an NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME that matches no interface of this host.

    NCCL itself reports "no socket interface found" only when the first collective starts.

    Args:
      environ: the environment variables; this process's by default.
      interfaces: the names of this host's interfaces; those that the system lists by default.

    Raises:
      ValueError: no interface matches.

    Example:
      >>> from txcore.launch.join.addresses import check_interfaces
      >>> check_interfaces({"NCCL_SOCKET_IFNAME": "eth"}, ["lo", "eth0"])
    """
    environ = os.environ if environ is None else environ
    if interfaces is None:
        interfaces = (name for _, name in socket.if_nameindex())
    names = sorted(interfaces)
    for variable, chosen in (
        ("NCCL_SOCKET_IFNAME", _matches_as_nccl),
        ("GLOO_SOCKET_IFNAME", _matches_exactly),
    ):
        wanted = environ.get(variable)
        if wanted and not any(chosen(wanted, name) for name in names):
            raise ValueError(
                f"{variable}={wanted!r} names no interface of this host, which has "
                f"{', '.join(names)}: set it to one of these, on each rank to what its own host "
                "has, or leave it out"
            )


def _matches_as_nccl(wanted: str, name: str) -> bool:
    """Tell whether NCCL would take an interface: prefixes, "=exact names", or "^all but"."""
    excludes, is_exact = wanted.startswith("^"), "=" in wanted[:2]
    words = [word for word in wanted.lstrip("^=").split(",") if word]
    is_listed = name in words if is_exact else name.startswith(tuple(words))
    return is_listed != excludes


def _matches_exactly(wanted: str, name: str) -> bool:
    return wanted == name
