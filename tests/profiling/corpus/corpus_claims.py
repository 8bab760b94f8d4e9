"""How a program is declared in which a tag lies."""

from collections.abc import Mapping
from typing import Any

from audit_cases import P, on, tag
from corpus.corpus_programs import Program
from jax import lax

LIES: dict[str, Program] = {}
GRID = {"data": 4, "model": 2}
LINE = {"data": 8}


def lie(*, axes: Mapping[str, int] = GRID, **more: Any):
    def register(build):
        LIES[build.__name__] = Program(build, axes, **more)
        return build

    return register


def psum_of(mesh, text):
    """Return a function that sums the rows of its argument over the axis data, under a tag."""

    def body(v):
        with tag(text):
            return lax.psum(v, "data")

    return on(mesh, P("data"), P())(body)
