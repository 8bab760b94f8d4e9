"""How an explicit program says which collectives it asks for, with their bytes.

Payload is nccl-tests' S: the bytes of the operand on one device, times n for an all-gather.
`rows(mesh)` is one row of 16 numbers on each of 8 devices: 64 bytes of float32. XLA for TPU turns
scatters as small as these into sums, of the same payload.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from audit_cases import P, on, shape
from corpus.corpus_programs import Program


@dataclass(frozen=True)
class Moves:
    """A collective that a program asks for: `payload` bytes in each of `trips` executions."""

    kind: str
    axes: tuple[str, ...]
    dtype: str
    payload: int
    trips: int = 1


@dataclass(frozen=True)
class Clean(Program):
    """An explicit program with its collectives; not `exact` where autodiff makes some of them.

    moves: what is on the wire on CPU; elsewhere: on another platform, where its compiler does
      what that of CPU does not (merge equal collectives, leave out those that need no wire).
    """

    moves: tuple[Moves, ...] = ()
    elsewhere: Mapping[str, tuple[Moves, ...]] = field(default_factory=dict)
    exact: bool = True

    def moves_on(self, platform: str) -> tuple[Moves, ...]:
        return self.elsewhere.get(platform, self.moves)


CLEAN: dict[str, Clean] = {}
AXES = ("data", "model", "pipe")
CUBE = {"data": 2, "model": 2, "pipe": 2}
GRID = {"data": 4, "model": 2}
LINE = {"data": 8}


def clean(*moves: Moves, axes: Mapping[str, int] = CUBE, **more: Any):
    def register(build):
        CLEAN[build.__name__] = Clean(build, axes, moves=moves, **more)
        return build

    return register


def reduced(payload, *axes, dtype="float32", trips=1):
    return Moves("all-reduce", axes, dtype, payload, trips)


def gathered(payload, *axes, dtype="float32", trips=1):
    return Moves("all-gather", axes, dtype, payload, trips)


def scattered(payload, *axes, dtype="float32", trips=1):
    return Moves("reduce-scatter", axes, dtype, payload, trips)


def exchanged(payload, *axes, dtype="float32", trips=1):
    return Moves("all-to-all", axes, dtype, payload, trips)


def permuted(payload, *axes, dtype="float32", trips=1):
    return Moves("collective-permute", axes, dtype, payload, trips)


def rows(mesh, dtype=jnp.float32):
    return shape(mesh, P(mesh.axis_names), 8, 16, dtype=dtype)


def per_device(mesh, body, *dtypes, **options):
    """Shard arguments of 8 rows and the result over all devices."""
    spec = P(mesh.axis_names)
    args = tuple(rows(mesh, dtype) for dtype in dtypes or (jnp.float32,))
    return on(mesh, spec, spec, **options)(body), args


def ring(n):
    return [(i, (i + 1) % n) for i in range(n)]
