"""A call of an op as the choice of its implementation sees it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Problem:
    """Hold one call of an op: all but the values of its operands."""

    op: str
    platform: str  # "cpu", "gpu", "tpu"
    device: str  # the device kind: "cpu", "NVIDIA H200", "TPU v5 lite"
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    @staticmethod
    def from_call(
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

    def get_option(self, name: str) -> Any:
        """Return the value of one of the options."""
        return dict(self.options)[name]

    @property
    def shape_class(self) -> tuple[tuple[int, ...], ...]:
        """The shapes, with the batch rounded up to a power of two.

        A measurement at a batch of 64 serves batches of 33 to 64. The batch is the first operand's
        leading dim, and so is an equal leading dim of another operand: of labels, say.
        """
        batch = self.shapes[0][:1] if self.shapes else ()
        found = []
        for shape in self.shapes:
            if shape and shape[:1] == batch:
                shape = (1 << max(shape[0] - 1, 0).bit_length(), *shape[1:])
            found.append(shape)
        return tuple(found)

    @property
    def key(self) -> str:
        """The name of the problem's class in a tuning file.

        Of a float option (a rate, a momentum) it holds only whether it is 0, which turns a part of
        the op off.
        """
        shapes = ",".join("x".join(map(str, shape)) or "scalar" for shape in self.shape_class)
        options = ",".join(f"{name}={_classify_option(value)}" for name, value in self.options)
        return "|".join((self.op, self.device, ",".join(self.dtypes), shapes, options))


def _classify_option(value: Any) -> Any:
    return "some" if isinstance(value, float) and value else value
