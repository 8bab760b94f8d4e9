"""Which engine a state belongs to: the static part of its tree, which is equal for all engines."""

import weakref
from typing import Any, Protocol

from txcore.optim import Optimizer
from txcore.plan import Plan
from txcore.train.numerics.precision import Precision


class Runner(Protocol):
    """What a state knows of the engine that made it."""

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer."""

    @property
    def plan(self) -> Plan:
        """The plan."""

    @property
    def precision(self) -> Precision:
        """The precision policy."""

    def kept(self, params: Any) -> Any:
        """Return what communication keeps from step to step, a pytree of `txcore.kept.Kept`."""

    def run(self, step: Any, state: Any, batch: Any) -> Any:
        """Run one step."""

    def place(self, fields: dict[str, Any], state: Any) -> dict[str, Any]:
        """Return fields of a state, some of them new, as arrays on the mesh."""


class Owner:
    """Name the engine of a state outside of a step.

    jax compares the static part of a tree to map two trees together and to find a compiled
    function, and its caches keep it for ever. So all owners are equal, states of two engines have
    the same structure, and an owner does not keep its engine alive; the state does that.
    """

    def __init__(self, engine: Runner | None = None) -> None:
        self._engine = None if engine is None else weakref.ref(engine)

    @property
    def engine(self) -> Runner | None:
        """The engine; None where there is none, or nobody holds it any more."""
        return None if self._engine is None else self._engine()

    def __eq__(self, other: object) -> bool:
        return type(other) is Owner

    def __hash__(self) -> int:
        return hash(Owner)

    def __repr__(self) -> str:
        return "Owner()"

    def __deepcopy__(self, memo: Any) -> "Owner":
        return self

    def __reduce__(self) -> Any:
        return Owner, ()  # an engine has devices, which are those of one process


class TracedOwner(Owner):
    """Name the engine whose step is being traced.

    A function under `jax.jit` or `jax.lax.scan` in a step may read the engine's optimizer and
    precision, and jax keeps its trace. So those of two engines differ.
    """

    def __eq__(self, other: object) -> bool:
        return type(other) is TracedOwner and self._engine == other._engine

    def __hash__(self) -> int:
        return hash(TracedOwner)


NOBODY = Owner()
