"""Payload and bus bandwidth as nccl-tests defines them, in one place.

With S the total bytes of a collective over n devices, each device sends at least
bus factor x S bytes: the time cannot be less than that over the bandwidth of its link. For an
all-gather S is n times one device's operand; for every other kind S is one device's operand.
https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
"""

import functools
import math
from fractions import Fraction

_ONE_PART_STAYS = ("all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all")


@functools.lru_cache(maxsize=1024)
def bus_factor(kind: str, n: int) -> Fraction:
    """Return the bytes that each device sends, as a multiple of S.

    Args:
      kind: HLO's name of the collective ("all-reduce"). Any that is not known here counts as one
        copy of S, like a permute, a broadcast or a send.
      n: devices in a group.

    Returns:
      2(n-1)/n for an all-reduce; (n-1)/n for an all-gather, a reduce-scatter and an all-to-all;
      else 1.

    Raises:
      ValueError: `n` is less than 1.

    Example:
      >>> [str(bus_factor(kind, 4)) for kind in ("all-reduce", "all-gather", "collective-permute")]
      ['3/2', '3/4', '1']
    """
    if n < 1:
        raise ValueError(
            f"bus_factor needs a group of at least 1 device, but got {n}: give the number of "
            "devices that talk to each other"
        )
    if kind == "all-reduce":
        return Fraction(2 * (n - 1), n)
    return Fraction(n - 1, n) if kind in _ONE_PART_STAYS else Fraction(1)


def wire_bytes(kind: str, n: int, payload: int) -> int:
    """Return the bytes that each device sends: the bus factor times S, rounded up.

    Args:
      kind: as for `bus_factor`.
      n: as for `bus_factor`.
      payload: S, in bytes of the dtype on the wire.

    Example:
      >>> wire_bytes("all-reduce", 8, 1_000_000)
      1750000
    """
    factor = bus_factor(kind, n)
    return -(-factor.numerator * payload // factor.denominator)


def ring_steps(kind: str, n: int) -> int:
    """Return how many messages follow each other in a ring: each costs the link's latency once.

    Args:
      kind: as for `bus_factor`.
      n: as for `bus_factor`.

    Example:
      >>> [ring_steps(kind, 4) for kind in ("all-reduce", "all-gather", "collective-permute")]
      [6, 3, 1]
    """
    return math.ceil(bus_factor(kind, n) * n) if kind in ("all-reduce", *_ONE_PART_STAYS) else 1
