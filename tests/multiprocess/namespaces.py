"""Two "hosts" on one machine: network namespaces with own addresses, names and hosts files."""

import contextlib
import os
import pathlib
import subprocess

import pytest

NAMES = ("first", "second")
ADDRESSES = ("10.203.0.1", "10.203.0.2")
# In a namespace: own hostname, own hosts file.
ENTER = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


class Hosts:
    """Two hosts that see each other; `command` says how to run something on one."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.namespaces = [f"tx{os.getpid()}{name}" for name in NAMES]
        self.set_hosts(*("".join(f"{a} {n}\n" for a, n in zip(ADDRESSES, NAMES, strict=True)),) * 2)

    def set_hosts(self, *texts):
        """Write what each host's file says, beside localhost."""
        for name, text in zip(NAMES, texts, strict=True):
            (self.folder / f"hosts.{name}").write_text(f"127.0.0.1 localhost\n{text}")

    def command(self, number, *words):
        """Return the command line that runs `words` on a host."""
        name = NAMES[number]
        enter = ["unshare", "--uts", "--mount", "sh", "-c", ENTER, "sh", name]
        hosts = str(self.folder / f"hosts.{name}")
        return ["ip", "netns", "exec", self.namespaces[number], *enter, hosts, *map(str, words)]


@contextlib.contextmanager
def two_hosts(folder):
    """Make two hosts, each with loopback and an address, joined by a cable; or skip the test."""
    hosts = Hosts(folder)
    try:
        try:
            _connect(hosts)
        except OSError as error:
            pytest.skip(f"this machine makes no network namespaces: {error}")
        yield hosts
    finally:
        for namespace in hosts.namespaces:
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, timeout=20)


def _connect(hosts):
    first, second = hosts.namespaces
    cable = [f"tx{os.getpid()}{end}" for end in "ab"]
    for namespace in hosts.namespaces:
        _ip("netns", "add", namespace)
        _ip("-n", namespace, "link", "set", "lo", "up")
    ends = [cable[0], "netns", first, "type", "veth", "peer", cable[1], "netns", second]
    _ip("link", "add", *ends)
    for namespace, end, address in zip(hosts.namespaces, cable, ADDRESSES, strict=True):
        _ip("-n", namespace, "address", "add", f"{address}/24", "dev", end)
        _ip("-n", namespace, "link", "set", end, "up")


def _ip(*words):
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(words)}: {done.stderr}")
