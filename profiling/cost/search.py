"""Search the meshes, batch sizes and rematerialisation policies of a program for the cheapest.

Each program that is tried is compiled, so the search compiles as few as it can. It leans on two
facts of training steps: with more rows in the batch, time and memory grow about in a line; and to
compute values anew instead of keeping them takes time and saves memory. So

1. of each mesh the two smallest batches are compiled, without rematerialisation: the line through
   them says what larger batches take, and what no policy is faster than
2. mesh by mesh, the most promising first, the largest batch that fits is looked for, then larger
   ones under policies that keep less, as long as the line says that they may beat the best so far

What it finds is the best of what was compiled; `Found.compiled` of `Found.possible` says how much.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from txcore.errors import TxcoreError

_SLACK = 0.05  # of a bound: lines are drawn through two points
_NEAR = 1.15  # times the memory: a batch that the line puts above it may still fit

Mesh = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Choice:
    """One program: a mesh, the rows of its global batch, and a rematerialisation policy's name.

    `rows` is 0 and `remat` is "" where the search does not vary them.
    """

    mesh: Mesh
    rows: int = 0
    remat: str = ""

    def __str__(self) -> str:
        parts = [",".join(f"{name}={size}" for name, size in self.mesh)]
        parts += [f"batch {self.rows}"] if self.rows else []
        parts += [f"remat {self.remat}"] if self.remat else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Outcome:
    """What a program costs.

    Attributes:
      choice: which program.
      seconds: the predicted time of one call.
      peak: bytes of memory on each device; None where the compiler gave up for want of it.
      memory: bytes that a device has.
      status: of its audit; "" where it was not compiled.
      remade_flops: FLOPs that the compiler computes anew to save memory.
    """

    choice: Choice
    seconds: float
    peak: int | None
    memory: int
    status: str = ""
    remade_flops: int = 0

    @property
    def fits(self) -> bool:
        """Tell whether it fits into a device's memory."""
        return self.peak is not None and self.peak <= self.memory

    @property
    def cost(self) -> float:
        """The seconds for each row of the batch; of the call where there is no batch."""
        return self.seconds / max(self.choice.rows, 1)


Measure = Callable[[Choice], Outcome]


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
      outcomes: what was compiled, in that order.
      refused: the choices that the program's author or the mesh does not allow, and why.
      possible: how many programs there are without the refused ones.
      stopped: whether the time was up before the end.
    """

    outcomes: tuple[Outcome, ...]
    refused: tuple[tuple[Choice, str], ...]
    possible: int
    stopped: bool = False

    @property
    def compiled(self) -> int:
        """How many programs were compiled."""
        return len(self.outcomes)

    @property
    def best(self) -> Outcome | None:
        """The program that takes the least time for a row, of those that fit; None without one."""
        fitting = (o for o in self.outcomes if o.fits)
        return min(fitting, key=lambda o: (o.cost, o.peak or 0), default=None)

    @property
    def largest(self) -> Outcome | None:
        """The fastest of the programs with the largest batch that was found to fit."""
        fitting = (o for o in self.outcomes if o.fits)
        return min(fitting, key=lambda o: (-o.choice.rows, o.cost), default=None)


class RefusedError(TxcoreError, ValueError):
    """A choice that is not legal: the program's author or the mesh refuses it."""


def list_meshes(devices: int, axes: Sequence[str]) -> list[Mesh]:
    """List all ways to part a number of devices over axes, in their order.

    Example:
      >>> list_meshes(4, ("data", "model"))
      [(('data', 4), ('model', 1)), (('data', 2), ('model', 2)), (('data', 1), ('model', 4))]
    """
    if not axes:
        return [()] if devices == 1 else []
    sizes = [n for n in range(devices, 0, -1) if devices % n == 0]
    return [((axes[0], n), *rest) for n in sizes for rest in list_meshes(devices // n, axes[1:])]


def search_programs(
    meshes: Sequence[Mesh],
    rows: Sequence[int],
    remats: Sequence[str],
    measure: Measure,
    *,
    seconds: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """Search for the program that takes the least time for a row of its batch, and fits.

    Args:
      meshes: those to try.
      rows: sizes of the global batch; empty where the program has none to choose.
      remats: policies, the one that keeps the most first; empty where there is none to choose.
      measure: compiles a choice; raises `RefusedError` where it is not legal.
      seconds: no program is compiled after that time; one may be under way.
      clock: tells the time.

    Returns:
      What was found.
    """
    state = _Search(
        sorted(set(rows)) or [0], list(remats) or [""], measure, clock() + seconds, clock
    )
    try:
        for mesh in meshes:
            state.draw_line(mesh)
        for mesh in sorted(state.lines, key=state.least_cost):
            state.try_mesh(mesh)
    except _TimeIsUpError:
        return state.result(len(meshes), stopped=True)
    return state.result(len(meshes))


class _TimeIsUpError(TxcoreError):
    """The search ends here, with what it has."""


@dataclass(frozen=True)
class _Line:
    """What a batch takes, as a line through two batches, and the batches that may be legal.

    Where the compiler gave up on a batch, its time is not known, and bounds nothing: a policy that
    keeps less may well fit there.
    """

    first: Outcome
    second: Outcome | None
    rows: tuple[int, ...]

    def seconds_of(self, rows: int) -> float:
        if self.first.peak is None:
            return 0.0
        if self.second is None or self.second.peak is None:
            return self.first.seconds
        return self._value_at(rows, self.first.seconds, self.second.seconds)

    def peak_of(self, rows: int) -> float:
        if self.first.peak is None:
            return float("inf")
        if self.second is None:
            return self.first.peak
        if self.second.peak is None:
            return float("inf") if rows >= self.second.choice.rows else self.first.peak
        return self._value_at(rows, self.first.peak, self.second.peak)

    def _value_at(self, rows: int, first: float, second: float) -> float:
        assert self.second is not None
        a, b = self.first.choice.rows, self.second.choice.rows
        return first + max(second - first, 0.0) * (rows - a) / (b - a)


@dataclass
class _Search:
    """A search in progress."""

    rows: list[int]
    remats: list[str]
    measure: Measure
    until: float
    clock: Callable[[], float]
    outcomes: dict[Choice, Outcome] = field(default_factory=dict)
    refused: dict[Choice, str] = field(default_factory=dict)
    lines: dict[Mesh, _Line] = field(default_factory=dict)

    def try_choice(self, choice: Choice) -> Outcome | None:
        """Compile a choice, once; None where it, or its batch without a policy, is refused."""
        if not self.refused.keys().isdisjoint((choice, replace(choice, remat=self.remats[0]))):
            return None
        if choice not in self.outcomes:
            if self.clock() > self.until:
                raise _TimeIsUpError
            try:
                self.outcomes[choice] = self.measure(choice)
            except RefusedError as error:
                self.refused[choice] = str(error)
                return None
        return self.outcomes[choice]

    def draw_line(self, mesh: Mesh) -> None:
        """Compile the two smallest legal batches of a mesh."""
        points: list[Outcome] = []
        for rows in self.rows:
            if len(points) < 2 and (found := self.try_choice(Choice(mesh, rows, self.remats[0]))):
                points.append(found)
        if points:
            legal = tuple(
                r for r in self.rows if Choice(mesh, r, self.remats[0]) not in self.refused
            )
            self.lines[mesh] = _Line(points[0], points[1] if len(points) > 1 else None, legal)

    def best_cost(self) -> float:
        return min((o.cost for o in self.outcomes.values() if o.fits), default=float("inf"))

    def least_cost(self, mesh: Mesh) -> float:
        """Return what a row costs on a mesh at least, however much memory there were."""
        return min(self.bound(mesh, rows) for rows in self.lines[mesh].rows)

    def bound(self, mesh: Mesh, rows: int) -> float:
        return self.lines[mesh].seconds_of(rows) / max(rows, 1) * (1 - _SLACK)

    def try_mesh(self, mesh: Mesh) -> None:
        """Look for the largest batch that fits, then for larger ones under each next policy."""
        line = self.lines[mesh]
        fitting = -1  # the largest batch known to fit
        for remat in self.remats:
            larger = [rows for rows in line.rows if rows > fitting]
            if remat == self.remats[0]:
                near = line.first.memory * _NEAR
                larger = [rows for rows in larger if line.peak_of(rows) <= near]
            fitting = max(fitting, self._find_largest(mesh, remat, larger))

    def _find_largest(self, mesh: Mesh, remat: str, rows: Sequence[int]) -> int:
        """Find the largest of these batches that fits and may be the best; -1 without one."""
        found = -1
        low, high = 0, len(rows) - 1
        at = high  # the largest first: the line said that it may fit, or a policy was made for it
        while low <= high:
            if self.bound(mesh, rows[at]) >= self.best_cost():
                low = at + 1  # smaller batches cost more a row
            elif (outcome := self.try_choice(Choice(mesh, rows[at], remat))) is None:
                rows = [*rows[:at], *rows[at + 1 :]]  # it says nothing of the others
                high -= 1
                at = min(at, high)
                continue
            elif outcome.fits:
                found, low = rows[at], at + 1
            else:
                high = at - 1
            at = (low + high + 1) // 2
        return found

    def result(self, meshes: int, *, stopped: bool = False) -> Found:
        whole = meshes * len(self.rows) * len(self.remats)
        # A batch that is refused under the first policy is not tried under the others.
        refused = [len(self.remats) if c.remat == self.remats[0] else 1 for c in self.refused]
        return Found(
            outcomes=tuple(self.outcomes.values()),
            refused=tuple(self.refused.items()),
            possible=whole - sum(refused),
            stopped=stopped,
        )


def every_choice(
    meshes: Sequence[Mesh], rows: Sequence[int], remats: Sequence[str]
) -> Iterator[Choice]:
    """Yield every program of a grid."""
    for mesh, batch, remat in itertools.product(meshes, rows or [0], remats or [""]):
        yield Choice(mesh, batch, remat)
