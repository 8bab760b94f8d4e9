"""How long a chip needs for a piece of work, and its network for a collective: lower bounds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from txcore.profiling.bandwidth import ring_steps, wire_bytes
from txcore.profiling.hlo import Op
from txcore.profiling.targets.chips import Chip
from txcore.profiling.work import Work

_HALF_WIDTH = ("bfloat16", "float16", "int8", "uint8", "float8", "float4", "int4", "uint4")


@dataclass(frozen=True)
class Transfer:
    """One collective on the network: the seconds that it takes alone, and what it occupies."""

    seconds: float
    links: frozenset[str]


@dataclass(frozen=True)
class Machine:
    """Chips and where each of them is.

    What it leaves out: contention (of two collectives that share a link the second waits, but
    nothing else slows a transfer down), the launch of kernels, caches, and how close real kernels
    come to the peaks. A TPU slice counts as a torus that wraps around in every dim.

    Attributes:
      chip: its peaks.
      places: where the devices are, in the mesh's order: the coordinates in a TPU's torus; of a
        GPU the number of its host.
      latency: seconds that each step of a ring takes at least.
    """

    chip: Chip
    places: tuple[tuple[int, ...], ...]
    latency: float = 1e-6

    def compute_seconds(self, work: Work) -> float:
        """Return the roofline's bound: the longer of computing at the peak and moving the bytes.

        8 bit and narrower types count at bfloat16's peak, all others at float32's.
        """
        computing = sum(
            flops / (self.chip.bf16_flops if _is_half(dtype) else self.chip.f32_flops)
            for dtype, flops in work.flops
        )
        return max(computing, work.bytes / self.chip.hbm_bytes_per_second)

    def transfer(self, op: Op) -> Transfer:
        """Return how long a collective takes: its wire bytes at its rate, and its steps' latency.

        Rings pass on all links along the dims of the torus that the group spans, and through the
        network cards of all its GPUs in a host; see `_torus_rate` and `_hosts_rate` for others.
        """
        group = max(op.groups, key=len, default=())
        n = max(len(group), 1)
        sent = wire_bytes(op.kind, n, op.bytes)
        if not sent:
            return Transfer(0.0, frozenset())
        members = [group] if group else list(op.pairs)
        spread = [[self.places[d] for d in some if d < len(self.places)] for some in members]
        on_torus = self.chip.network_bytes_per_second is None
        rate, links = (self._torus_rate if on_torus else self._hosts_rate)(op.kind, spread)
        return Transfer(sent / rate + self.latency * ring_steps(op.kind, n), links)

    def _torus_rate(
        self, kind: str, spread: Sequence[Sequence[tuple[int, ...]]]
    ) -> tuple[float, frozenset[str]]:
        """Return wire bytes per second along the dims of the torus that a group spans.

        A permute takes the links of one way, as often as its longest hop; an all-to-all's bytes
        each take the mean of the distances along the longest dim.
        """
        sizes = [1 + max(axis) for axis in zip(*self.places, strict=True)]
        extents = {
            dim: max(len({place[dim] for place in places}) for places in spread if places)
            for dim in range(len(sizes))
            if any(len({place[dim] for place in places}) > 1 for places in spread)
        }
        links = frozenset(f"ici{dim}" for dim in extents)
        one = self.chip.link_bytes_per_second
        ways = {dim: 1 if extent == 2 else 2 for dim, extent in extents.items()}
        if not extents:
            return one, links
        if kind in ("collective-permute", "send"):
            hops = max(_hops(places, sizes) for places in spread)
            return one / max(hops, 1), links
        if kind in ("all-to-all", "ragged-all-to-all"):
            n = len(spread[0])
            slowest = max((e * e // 4) / e / ways[dim] for dim, e in extents.items())
            return (n - 1) / n * one / slowest, links
        return one * min(sum(ways.values()), self.chip.links), links

    def _hosts_rate(
        self, kind: str, spread: Sequence[Sequence[tuple[int, ...]]]
    ) -> tuple[float, frozenset[str]]:
        """Return wire bytes per second between GPUs; one collective at a time, as XLA runs them.

        In a ring over several hosts the group's GPUs of a host share its traffic between their
        network cards; in an all-to-all each sends all that goes to other hosts through its own.
        """
        queue = frozenset({"collectives"})
        link, network = self.chip.link_bytes_per_second, self.chip.network_bytes_per_second
        hosts = [[place[0] for place in places] for places in spread]
        if network is None or all(len(set(some)) <= 1 for some in hosts):
            return link, queue
        if kind in ("collective-permute", "send"):
            return network, queue
        n, local = len(hosts[0]), min(hosts[0].count(host) for host in hosts[0])
        if kind in ("all-to-all", "ragged-all-to-all"):
            return min(link, network * (n - 1) / (n - local)), queue
        return min(link, network * local), queue


def machine_on(chip: Chip, devices: Sequence[Any]) -> Machine:
    """Return the machine that a program's devices are on.

    Args:
      chip: what each of them is.
      devices: the mesh's jax devices, in its order.
    """
    if chip.network_bytes_per_second is None:
        return Machine(chip, tuple(tuple(int(c) for c in d.coords) for d in devices))
    return Machine(chip, tuple((int(d.process_index),) for d in devices))


def _is_half(dtype: str) -> bool:
    return dtype.startswith(_HALF_WIDTH)


def _hops(places: Sequence[tuple[int, ...]], sizes: Sequence[int]) -> int:
    """Return the links between the two ends of a permute's pair, the short way round."""
    if len(places) < 2:
        return 0
    apart = [abs(a - b) for a, b in zip(*places, strict=True)]
    return sum(min(d, size - d) for d, size in zip(apart, sizes, strict=True))
