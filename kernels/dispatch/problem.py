"""What the choice of an implementation may depend on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Problem:
    """Hold one call of an op, its values left out."""

    op: str
    platform: str  # "cpu", "gpu", "tpu"
    device: str  # the device kind: "cpu", "NVIDIA H200", "TPU v5 lite"
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(
        op: str,
        device: tuple[str, str],
        operands: Sequence[jax.Array],
        options: Mapping[str, Any],
    ) -> "Problem":
        """Describe a call on a device, given as (platform, device kind)."""
        return Problem(
            op,
            *device,
            tuple(tuple(x.shape) for x in operands),
            tuple(str(x.dtype) for x in operands),
            tuple(sorted(options.items())),
        )

    def option(self, name: str) -> Any:
        """Return the value of one of the options."""
        return dict(self.options)[name]

    @property
    def shape_class(self) -> tuple[tuple[int, ...], ...]:
        """The shapes, the batch rounded up to a power of two.

        What was measured at a batch of 64 serves batches of 33 to 64. The batch is the first
        operand's leading dim, wherever it leads: in labels too, but not in weights.
        """
        batch = self.shapes[0][:1] if self.shapes else ()
        return tuple(
            (1 << max(s[0] - 1, 0).bit_length(), *s[1:]) if s and s[:1] == batch else s
            for s in self.shapes
        )

    @property
    def key(self) -> str:
        """The name of the problem's class in a tuning cache.

        Of a float (a rate, a momentum) only whether it is 0 counts, which turns a part off.
        """
        shapes = ",".join("x".join(map(str, s)) or "scalar" for s in self.shape_class)
        options = ",".join(
            f"{name}={'some' if isinstance(value, float) and value else value}"
            for name, value in self.options
        )
        return "|".join((self.op, self.device, ",".join(self.dtypes), shapes, options))
