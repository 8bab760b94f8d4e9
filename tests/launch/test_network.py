"""Addresses, interfaces and proxies, and the door that closes."""

import re
import socket

import pytest

from txcore.launch.join import addresses
from txcore.launch.join.seal_port import seal_listeners


@pytest.mark.parametrize(
    "text, host, port",
    [("host:1", "host", 1), ("10.0.0.1:65535", "10.0.0.1", 65535), ("[fd00::1]:80", "fd00::1", 80)],
)
def test_address(text, host, port):
    assert addresses.split_address(text) == (host, port)
    assert addresses.join_address(host, port) == text


@pytest.mark.parametrize(
    "text",
    ["", "host", ":1", "host:", "host:http", "host:0", "host:65536", "::1:80", "[::1]", "h:1\n"],
)
def test_no_address(text):
    text_of_error = (
        f"split_address needs 'host:port', got {text!r}: write an IPv6 host as '[::1]:12345'"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text_of_error)}$"):
        addresses.split_address(text)


def test_the_way_to_loopback_is_loopback():
    assert addresses.address_towards("127.0.0.1", 1) == "127.0.0.1"
    assert addresses.resolve_host("localhost", 1) == "127.0.0.1"
    assert addresses.is_loopback("127.0.1.1")
    assert addresses.is_loopback("::1")
    assert not addresses.is_loopback("10.127.0.1")


@pytest.mark.parametrize(
    "before, after",
    [
        ({}, {}),
        ({"no_proxy": "a"}, {}),
        ({"http_proxy": "p"}, {"no_grpc_proxy": "node1"}),
        ({"https_proxy": "p", "no_proxy": "a,b"}, {"no_grpc_proxy": "a,b,node1"}),
        ({"grpc_proxy": "p", "no_proxy": "a", "no_grpc_proxy": "c"}, {"no_grpc_proxy": "c,node1"}),
    ],
)
def test_proxies_are_not_asked_for_the_coordinator(before, after):
    environment = dict(before)
    addresses.bypass_proxies("node1", environment)
    assert environment == before | after


@pytest.mark.parametrize(
    "wanted", ["eth0", "eth", "ib,eth", "=eth0", "=ib0,eth0", "^docker", "^eth", "^=eth", ""]
)
def test_interfaces_that_nccl_finds(wanted):
    addresses.check_interfaces({"NCCL_SOCKET_IFNAME": wanted}, ["lo", "eth0"])


@pytest.mark.parametrize(
    "variable, wanted",
    [
        ("NCCL_SOCKET_IFNAME", "ib"),
        ("NCCL_SOCKET_IFNAME", "=eth"),
        ("NCCL_SOCKET_IFNAME", "^eth,lo"),
        ("GLOO_SOCKET_IFNAME", "eth"),
    ],
)
def test_interfaces_that_nobody_finds(variable, wanted):
    text = (
        f"{variable}={wanted!r} names no interface of this host, which has eth0, lo: set it to one "
        "of these, on each rank to what its own host has, or leave it out"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        addresses.check_interfaces({variable: wanted}, ["lo", "eth0"])


def test_a_closed_door_keeps_those_who_are_in():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        with socket.create_connection(address) as inside, listener.accept()[0] as served:
            if not seal_listeners(address[1]):
                pytest.skip("this system has no /proc/net, or no filters for sockets")
            with pytest.raises(TimeoutError):
                socket.create_connection(address, timeout=0.5)
            inside.sendall(b"in")
            assert served.recv(2) == b"in"
            served.sendall(b"out")
            assert inside.recv(3) == b"out"


def test_only_the_door_of_this_port_closes():
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_server(("127.0.0.1", 0)) as other,
    ):
        if not seal_listeners(other.getsockname()[1]):
            pytest.skip("this system has no /proc/net, or no filters for sockets")
        socket.create_connection(listener.getsockname(), timeout=5).close()
    assert not seal_listeners(1)
