"""One equation as a walk along a mesh axis sees it, and the meaning of its reduction."""

from collections.abc import Sequence
from dataclasses import dataclass

from txcore import tags
from txcore.profiling.declared.equations import (
    CASTS,
    SUMS,
    Eqn,
    Jaxpr,
    Var,
    axes_of,
    is_literal,
    made_by_autodiff,
    path_of,
)
from txcore.profiling.declared.forward import Frame
from txcore.profiling.declared.relation import Relation


@dataclass(frozen=True)
class Seen:
    """An equation as a walk sees it.

    Attributes:
      eqn: the equation.
      jaxpr: the jaxpr that holds it.
      name: the name of its primitive.
      axis: the mesh axis that the walk follows.
      sizes: the sizes of all the mesh's axes.
      inputs, outputs: the relations of its values to that axis.
      splits: whether it is a cond or while whose predicate differs along the axis.
      frame: its surroundings.
    """

    eqn: Eqn
    jaxpr: Jaxpr
    name: str
    axis: str
    sizes: dict[str, int]
    inputs: Sequence[Relation]
    outputs: Sequence[Relation]
    splits: bool
    frame: Frame

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that it names, as a collective does."""
        return axes_of(self.eqn.params)

    @property
    def path(self) -> str:
        """The jax transformations that made it."""
        return path_of(self.eqn, self.frame.path)

    @property
    def tag(self) -> str | None:
        """The tag of the call of txcore that made it."""
        return tags.tag_in(self.path)

    @property
    def by_autodiff(self) -> bool:
        """Whether it is the transpose of a cast or of a gather, not a reduction of the user's."""
        return sums_cotangents(self.name, self.path)

    def is_divided(self, result: Var) -> bool:
        """Tell whether a result, a sum, is only ever divided by the number of devices: a mean."""
        return is_divided(self.jaxpr, result, counts_of(self.axes, self.axis, self.sizes))


def sums_cotangents(name: str, path: str) -> bool:
    """Tell whether a reduction is the transpose of a cast or of a gather.

    One that is written in the backward function of a custom derivative has another tag.
    """
    if name not in SUMS or not made_by_autodiff(path):
        return False
    tag = tags.tag_in(path)
    return tag is None or tag.split("/")[0] in ("vary", "all_gather")


def counts_of(axes: tuple[str, ...], axis: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """Return the numbers of devices, along all of `axes` and along one, that make sums means."""
    count = 1
    for name in axes:
        count *= sizes.get(name, 1)
    return count, sizes[axis]


def is_divided(jaxpr: Jaxpr, var: Var, counts: tuple[int, ...]) -> bool:
    """Tell whether a sum is only ever divided by a number of devices (`counts_of`)."""
    uses = [eqn for eqn in jaxpr.eqns if any(v is var for v in eqn.invars)]
    if len(uses) != 1 or any(v is var for v in jaxpr.outvars):
        return False
    (use,) = uses
    if use.primitive.name in ("convert_element_type", "reshape", "neg"):
        return is_divided(jaxpr, use.outvars[0], counts)
    found = (_literal_behind(jaxpr, v) for v in use.invars)
    numbers = [float(v.val) for v in found if v is not None and v.aval.size == 1]
    if use.primitive.name == "div" and use.invars[0] is var:
        return any(n in counts for n in numbers)
    return use.primitive.name == "mul" and any(abs(n * counts[0] - 1) < 1e-6 for n in numbers)


def _literal_behind(jaxpr: Jaxpr, var: Var) -> Var | None:
    """Return the literal that a value is a cast of, or None; jax casts numbers to vary."""
    while not is_literal(var):
        made = [eqn for eqn in jaxpr.eqns if any(v is var for v in eqn.outvars)]
        if len(made) != 1 or made[0].primitive.name not in (*CASTS, "convert_element_type"):
            return None
        (var,) = made[0].invars
    return var
