"""What speedup was to be expected: from a bare step's time, and from the all-reduce's alone.

A step of n workers is that of its part of the batch on one worker, and then an all-reduce that
nothing hides (XLA has no asynchronous collectives on CPU). Where workers share cores, computing
takes as many times as long. Contention for memory, waiting for slower workers and reading the
input are left out: what they cost is the difference between expected and measured.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from txcore.profiling.bandwidth import ring_steps, wire_bytes

KIND = "all-reduce"


@dataclasses.dataclass(frozen=True)
class Link:
    """What joins the workers: seconds of each message at least, and bytes a second."""

    latency: float
    bandwidth: float

    def seconds(self, ranks: int, payload: int, calls: int = 1) -> float:
        """Return the time of all-reduces of `payload` bytes in all, in a ring of ranks.

        Example:
          >>> Link(latency=0.001, bandwidth=1e6).seconds(2, 1_000_000)
          1.002
        """
        if ranks == 1:
            return 0.0
        steps = calls * ring_steps(KIND, ranks)
        return steps * self.latency + wire_bytes(KIND, ranks, payload) / self.bandwidth


def fit_link(ranks: int, small: Mapping[str, float], large: Mapping[str, float]) -> Link:
    """Return the link on which all-reduces of two sizes take as long as they were measured.

    Args:
      ranks: how many took part.
      small: "bytes" and "seconds" of an all-reduce that is nearly all latency.
      large: of a larger one.

    Example:
      >>> true = Link(latency=1e-4, bandwidth=1e9)
      >>> rows = [{"bytes": size, "seconds": true.seconds(4, size)} for size in (4096, 1 << 22)]
      >>> found = fit_link(4, *rows)
      >>> round(found.latency, 9), round(found.bandwidth)
      (0.0001, 1000000000)
    """
    sent = [wire_bytes(KIND, ranks, int(each["bytes"])) for each in (small, large)]
    seconds = large["seconds"] - small["seconds"]
    # A small one may take longer on a busy machine: then all is latency.
    bandwidth = (sent[1] - sent[0]) / seconds if seconds > 0 else float("inf")
    latency = max(small["seconds"] - sent[0] / bandwidth, 0.0) / ring_steps(KIND, ranks)
    return Link(latency, bandwidth)


def expect_speedup(
    bare: Mapping[int, float], batch_size: int, workers: int, *, together: float, sharing: float = 1
) -> float | None:
    """Return the speedup of workers that share one batch; None where its part was not timed.

    Args:
      bare: seconds of a step of one worker by batch size.
      batch_size: of the global batch.
      workers: how many share it.
      together: seconds of the all-reduce.
      sharing: how many workers there are for each set of cores that one had.

    Example:
      >>> expect_speedup({128: 0.1, 64: 0.06}, 128, 2, together=0.02)
      1.25
    """
    part = bare.get(batch_size // workers)
    if part is None or batch_size % workers:
        return None
    return bare[batch_size] / (part * max(sharing, 1) + together)


def expect_efficiency(
    bare: Mapping[int, float], batch_size: int, *, together: float, sharing: float = 1
) -> float:
    """Return the share of n times one worker's pace that n workers reach, each with its own batch.

    Example:
      >>> expect_efficiency({128: 0.1}, 128, together=0.025)
      0.8
    """
    return bare[batch_size] / (bare[batch_size] * max(sharing, 1) + together)


def carry_to_ranks(
    bare: Mapping[int, float],
    batch_size: int,
    link: Link,
    programs: Mapping[int, Mapping[str, int]],
) -> list[dict[str, float | int | None]]:
    """Return what is expected of many ranks as this machine's workers, joined as they are.

    Args:
      bare: as for `expect_speedup`.
      batch_size: as for `expect_speedup`.
      link: between two ranks; each has one of its own.
      programs: by ranks, "payload_bytes" and "calls" of the program compiled for so many.
    """
    rows: list[dict[str, float | int | None]] = []
    for ranks, program in programs.items():
        together = link.seconds(ranks, program["payload_bytes"], program["calls"])
        rows.append(
            {
                "ranks": ranks,
                "all_reduce_seconds": together,
                "strong_speedup": expect_speedup(bare, batch_size, ranks, together=together),
                "weak_efficiency": expect_efficiency(bare, batch_size, together=together),
            }
        )
    return rows


def read_bare(case: Mapping[str, Mapping[str, float]]) -> dict[int, float]:
    """Return the seconds of bare steps by batch size, whose keys JSON has made texts."""
    return {int(size): seconds for size, seconds in case["bare_step_seconds"].items()}


def slowest(rows: Sequence[Mapping[str, float]]) -> float:
    """Return the seconds of the largest all-reduce measured; 0 where there was none."""
    return rows[-1]["seconds"] if rows else 0.0
