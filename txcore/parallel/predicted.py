"""What a plan says that a step communicates."""

from dataclasses import dataclass

import jax.numpy as jnp


@dataclass(frozen=True)
class Predicted:
    """State what one step communicates because of its plan: arrays of one kind of collective.

    Attributes:
      what: what is sent: "gradients", "gradient norm" (the squares of parts, for clipping) or
        "finite gradients" (whether the parts are, for the decision to skip a step), "parameters"
        (local SGD averages them), or what Adasum sends.
      kind: HLO's name of the collective ("all-reduce").
      axes: the mesh axes, all of them of more than one device.
      dtype: jax's name of the dtype ("float32").
      elements: those of each array, as it enters into S.
      at_most: whether a step may send less, since its model decides how much.
      per_microbatch: whether a step in microbatches sends them once for each.
      every: it is sent in one step of so many, in a branch of the program.
    """

    what: str
    kind: str
    axes: tuple[str, ...]
    dtype: str
    elements: tuple[int, ...]
    at_most: bool = False
    per_microbatch: bool = False
    every: int = 1

    @property
    def payload_bytes(self) -> int:
        """S as in nccl-tests: of an all-reduce, the bytes of the arrays on one device."""
        return sum(self.elements) * jnp.dtype(self.dtype).itemsize
