"""What a compression is: data and pure functions. Whoever writes another one makes a record too."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from txcore.parallel.predicted import Predicted


@dataclass(frozen=True)
class Exchange:
    """State between which devices gradients are averaged, and what of the mean each one gets.

    Attributes:
      sizes: the size of each axis by name, outermost first; no axis of one device.
      name: label of the operations' tags.
      parts: the axes, some of `sizes`, along which each device gets its part of the mean alone; ()
        where each gets all of it.
      dims: with `parts`, the dim of each gradient that is split.
    """

    sizes: Mapping[str, int]
    name: str = "grads"
    parts: tuple[str, ...] = ()
    dims: tuple[int, ...] = ()

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes."""
        return tuple(self.sizes)

    @property
    def devices(self) -> int:
        """The number of devices that exchange."""
        return math.prod(self.sizes.values())

    @property
    def others(self) -> tuple[str, ...]:
        """The axes but `parts`."""
        return tuple(axis for axis in self.sizes if axis not in self.parts)

    def along(self, axes: tuple[str, ...]) -> "Exchange":
        """Return the exchange over some of the axes, of which each device gets all of the mean."""
        return Exchange({axis: self.sizes[axis] for axis in axes}, self.name)

    def predict(self, kind: str, dtype: str, *elements: int) -> Predicted:
        """Return the prediction that arrays of so many elements are sent over all axes."""
        return Predicted("gradients", kind, self.axes, dtype, elements)


# (gradients, what is kept of each, exchange) -> (means, errors, what is kept of each)
Average = Callable[
    [list[jax.Array], list[Any], Exchange], tuple[list[jax.Array], list[jax.Array], list[Any]]
]
Sends = Callable[[list[jax.ShapeDtypeStruct], Exchange], list[Predicted]]
# (a whole parameter, its layout, sizes of the mesh's axes) -> pytree of Kept, None for nothing
Keeps = Callable[[jax.ShapeDtypeStruct, Any, Mapping[str, int]], Any]


@dataclass(frozen=True)
class Compression:
    """State how gradients are averaged with fewer bytes on the wire.

    What the means lack of the gradients is added to those of the next step where `feedback` says
    so (error feedback). txcore does that, for every compression in the same way.

    Attributes:
      name: as reprs show it, with its options; two of one name are equal.
      average: (grads, kept, exchange) -> (means, errors, kept), lists of one entry for each leaf.
        The gradients are float32 or float64 and local, with what was left over added. The means
        are the same on all devices, or each device's part of them. The errors are this device's
        share of what the means lack: their mean over the devices is that of the gradients minus
        the means. A value that is not finite stays so in the means.
      sends: (shapes, exchange) -> what `average` sends, as the audit finds it. The shapes are
        those of this device's gradients, in the dtype of `average`.
      keeps: (whole parameter's shape, layout, mesh sizes) -> the pytree of `txcore.kept.Kept` that
        `average` gets and returns for that leaf; None for nothing. No function: nothing at all.
      feedback: whether each device keeps its errors.
      scatters: whether `average` itself makes the parts along `exchange.parts`. If not, it is
        asked for all of the mean, and each device then takes its part.
      start: the number of steps that average without it first.

    Example:
      >>> def average(grads, kept, exchange):  # the sign alone, times the mean size
      ...     signs = [jnp.sign(g) * jnp.mean(jnp.abs(g)) for g in grads]
      ...     errors = [g - sign for g, sign in zip(grads, signs)]
      ...     return tx.pmean(signs, exchange.axes, name=exchange.name), errors, kept
      >>> def sends(shapes, exchange):
      ...     return [exchange.predict("all-reduce", x.dtype.name, x.size) for x in shapes]
      >>> tx.DP("data", compression=tx.compression.Compression("sign", average, sends))
      DP(axis='data', compression=sign)

    References:
      Karimireddy et al., "Error feedback fixes SignSGD and other gradient compression schemes",
      2019.
    """

    name: str
    average: Average = field(compare=False)
    sends: Sends = field(compare=False)
    keeps: Keeps | None = field(default=None, compare=False)
    feedback: bool = False
    scatters: bool = False
    start: int = 0

    def __repr__(self) -> str:
        return self.name

    @property
    def has_state(self) -> bool:
        """Whether it keeps anything from step to step."""
        return self.feedback or self.keeps is not None or self.start > 0
