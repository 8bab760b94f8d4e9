"""How a program says what gets in unasked: its class, and a mark at the line that causes it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from corpus.corpus_programs import Program


@dataclass(frozen=True)
class Added(Program):
    """A program with communication that is not in it.

    origin: the class that it has to get.
    eager: written to run operation by operation, without jit.
    only_when_run: its communication is in no compiled program; only the gate can see it.
    """

    origin: str = "partitioner"
    eager: bool = False
    only_when_run: bool = False


ADDED: dict[str, Added] = {}
UNNAMED = {"gate": "XLA gives what it inserts at a result neither name nor line"}
GRID = {"data": 4, "model": 2}


def added(origin: str = "partitioner", *, axes: Mapping[str, int] = GRID, **more: Any):
    def register(build):
        ADDED[build.__name__] = Added(build, axes, origin=origin, **more)
        return build

    return register
