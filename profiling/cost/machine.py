"""Compute how long a chip at its peaks needs for work, and its network for a collective."""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from txcore.profiling.bandwidth import ring_steps, wire_bytes
from txcore.profiling.cost.instruction import Work
from txcore.profiling.hlo import Groups, Op
from txcore.profiling.hlo.read_groups import Pairs
from txcore.profiling.targets.chips import Chip

_POINT_TO_POINT = ("collective-permute", "send")
REMOTE_DMA = "remote-dma"  # a kernel's own copies, half of the bytes either way round a ring
_ALL_TO_ALL = ("all-to-all", "ragged-all-to-all")
_HALF_WIDTH = ("bfloat16", "float16", "int8", "uint8", "float8", "float4", "int4", "uint4")


@dataclass(frozen=True)
class Transfer:
    """One collective on the network: the seconds that it takes alone, and the links it occupies."""

    seconds: float
    links: frozenset[str]


@dataclass(frozen=True)
class Machine:
    """Chips and where each of them is.

    The model ignores contention (the second of two collectives on one link waits, but nothing
    else slows a transfer down), the launch of kernels, caches, and how close real kernels come to
    the peaks. It takes a TPU slice for a torus that wraps around in every dim.

    Attributes:
      chip: its peaks.
      places: where the devices are, in the mesh's order: the coordinates in a TPU's torus; of a
        GPU the number of its host.
      latency: seconds that each message takes at least. The data sheets do not give it; a
        microsecond is the order of magnitude on all of these networks.
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

    def transfer_of(self, op: Op) -> Transfer:
        """Return how long a collective takes: its wire bytes at its rate, and its steps' latency.

        A ring passes on all links along the dims of the torus that the group spans, or through
        the network cards of all its GPUs in a host. Its steps are those of one ring for each dim
        of the torus; between GPUs, of one in each host and a tree of hosts. A kernel's copies by
        remote DMA (`REMOTE_DMA`) go from each device of the mesh's order to both of its neighbours.
        """
        sent = wire_bytes(op.kind, max(op.group_size, 1), op.bytes)
        if not sent:
            return Transfer(0.0, frozenset())
        members = op.groups or op.pairs
        last = op.groups.last if op.groups else max(map(max, op.pairs), default=0)
        if last >= len(self.places):
            raise ValueError(
                f"{op.name} is on device {last}, but the machine has {len(self.places)}: give the "
                "devices of the program's mesh"
            )
        path = _find_path(self, op.kind, members)
        return Transfer(sent / path.rate + self.latency * path.steps, path.links)


@dataclass(frozen=True)
class _Path:
    """The wire bytes per second, the occupied links, and the number of successive messages."""

    rate: float
    links: frozenset[str]
    steps: int


_Spread = Sequence[Sequence[tuple[int, ...]]]  # the places of each group, or permute's pair


@functools.lru_cache(maxsize=1024)
def _find_path(machine: Machine, kind: str, members: Groups | Pairs) -> _Path:
    if not members:  # a send, whose receiver is in another program
        return _Path(machine.chip.link_bytes_per_second, frozenset(), 1)
    spread = [[machine.places[device] for device in some] for some in members]
    on_torus = machine.chip.network_bytes_per_second is None
    if kind == REMOTE_DMA and on_torus:
        return _path_round_ring(machine, spread)
    return (_path_on_torus if on_torus else _path_on_hosts)(machine, kind, spread)


def _path_on_torus(machine: Machine, kind: str, spread: _Spread) -> _Path:
    """Return how a collective goes along the dims of a torus.

    A permute takes the links of one way, as often as its longest hop; an all-to-all's bytes each
    go a quarter of the longest dim far on average.
    """
    sizes = [1 + max(along) for along in zip(*machine.places, strict=True)]
    extents = {
        dim: extent
        for dim in range(len(sizes))
        if (extent := max(len({place[dim] for place in places}) for places in spread)) > 1
    }
    links = frozenset(f"ici{dim}" for dim in extents)
    one = machine.chip.link_bytes_per_second
    ways = {dim: 1 if extent == 2 else 2 for dim, extent in extents.items()}
    if not extents:
        return _Path(one, links, 1)
    if kind in _POINT_TO_POINT:
        hops = max(_count_hops(places, sizes) for places in spread)
        return _Path(one / hops, links, hops)
    steps = sum(ring_steps(kind, extent) for extent in extents.values())
    if kind in _ALL_TO_ALL:
        n = max(map(len, spread))
        slowest = max((e * e // 4) / e / ways[dim] for dim, e in extents.items())
        return _Path((n - 1) / n * one / slowest, links, steps)
    return _Path(one * min(sum(ways.values()), machine.chip.links), links, steps)


def _path_round_ring(machine: Machine, spread: _Spread) -> _Path:
    """Return how the copies of a kernel go round a ring, as often over a link as its longest hop.

    Two devices have one link between them, and not two ways round.
    """
    n = max(map(len, spread))
    sizes = [1 + max(along) for along in zip(*machine.places, strict=True)]
    links = frozenset(
        f"ici{dim}"
        for dim in range(len(sizes))
        if any(len({place[dim] for place in places}) > 1 for places in spread)
    )
    hops = max(
        _count_hops((places[i - 1], places[i]), sizes)
        for places in spread
        for i in range(len(places))
    )
    one = machine.chip.link_bytes_per_second
    return _Path(one * min(n - 1, 2) / max(hops, 1), links, (n - 1) * max(hops, 1))


def _path_on_hosts(machine: Machine, kind: str, spread: _Spread) -> _Path:
    """Return how a collective goes between GPUs; XLA runs one at a time.

    In a ring over several hosts the group's GPUs of a host share its traffic between their
    network cards; in an all-to-all each sends all that goes to other hosts through its own.
    """
    queue = frozenset({"collectives"})
    link, network = machine.chip.link_bytes_per_second, machine.chip.network_bytes_per_second
    hosts = [[place[0] for place in places] for places in spread]
    n, most_hosts = max(map(len, hosts)), max(len(set(some)) for some in hosts)
    if network is None or most_hosts == 1:
        return _Path(link, queue, ring_steps(kind, n))
    if kind in _POINT_TO_POINT:
        return _Path(network, queue, 1)
    # Of the GPUs in a host, the fewest that any group which leaves it has there.
    local = min(min(Counter(some).values()) for some in hosts if len(set(some)) > 1)
    if kind in _ALL_TO_ALL:
        return _Path(min(link, network * (n - 1) / (n - local)), queue, n - 1)
    over_hosts = math.ceil(math.log2(most_hosts)) * ring_steps(kind, 2)
    return _Path(min(link, network * local), queue, ring_steps(kind, local) + over_hosts)


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


def _count_hops(places: Sequence[tuple[int, ...]], sizes: Sequence[int]) -> int:
    """Return the number of links between the ends of a permute's pair, the short way round."""
    apart = [abs(a - b) for a, b in zip(*places, strict=True)]
    return sum(min(d, size - d) for d, size in zip(apart, sizes, strict=True))
