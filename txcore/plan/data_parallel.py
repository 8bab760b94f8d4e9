"""Data parallelism: the batch is sharded, gradients are averaged, and state may be sharded too."""

from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Literal, get_args

from txcore.parallel.gradients.compression import Compression, as_compression

Shard = Literal["optimizer", "gradients", "parameters"]


@dataclass(frozen=True)
class DP:
    """Data parallelism: the batch is sharded over `axis`, gradients are averaged over it.

    Args:
      axis: mesh axis name, or a tuple of names that shard the batch together.
      shard: what each device keeps its part of alone, in place of all of it (ZeRO 1 to 3):
        "optimizer" its moments, "gradients" also the gradients of microbatches, "parameters" also
        the parameters, which a step gathers as it needs them. None: every device keeps all.
      shard_axis: the data axes over which `shard` splits, some of `axis`; over the others the parts
        are repeated (HSDP). None: all of them.
      compression: how gradients are averaged with fewer bytes: "bf16", "fp16", "int8" or what a
        function of `tx.compression` returns, as powersgd(rank=2) or top_k(). None: exactly.

    Example:
      >>> tx.DP(axis="data").axes
      ('data',)
    """

    axis: str | tuple[str, ...]
    _: KW_ONLY
    shard: Shard | None = None
    shard_axis: str | tuple[str, ...] | None = None
    compression: Compression | str | None = None

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        usual = {f.name: f.default for f in fields(self)}
        shown = [f"{name}={value!r}" for name, value in given.items() if value != usual[name]]
        return f"DP({', '.join(shown)})"

    def __post_init__(self) -> None:
        axes = self.axes
        if not axes or not all(isinstance(a, str) for a in axes) or len(set(axes)) != len(axes):
            raise ValueError(
                f"DP needs axis= a mesh axis name or a tuple of different names, got {self.axis!r}"
            )
        if self.shard is not None and self.shard not in get_args(Shard):
            raise ValueError(
                "DP needs shard= 'optimizer', 'gradients', 'parameters' or None, got "
                f"{self.shard!r}"
            )
        self._check_shard_axis()
        self._check_compression()

    def _check_compression(self) -> None:
        compression = as_compression("DP", self.compression)
        if compression is not None and self.shard == "parameters":
            raise ValueError(
                f"DP needs compression=None with shard='parameters', got {compression}: there a "
                "gradient is averaged layer by layer in the backward pass, which has no place for "
                "what a compression keeps. Write shard='gradients', or algorithm='bf16_wire'"
            )

    def _check_shard_axis(self) -> None:
        if self.shard_axis is None:
            return
        if self.shard is None:
            raise ValueError(
                f"DP needs shard= with shard_axis={self.shard_axis!r}, got None: say what is split "
                "over it, as shard='optimizer'"
            )
        own = _as_tuple(self.shard_axis)
        if not own or len(set(own)) != len(own) or not set(own) <= set(self.axes):
            raise ValueError(
                f"DP needs shard_axis= some of its data axes {self.axes}, got {self.shard_axis!r}"
            )

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes as a tuple."""
        return _as_tuple(self.axis)

    @property
    def shard_axes(self) -> tuple[str, ...]:
        """The axes over which state is split, as a tuple in the order of `axes`; () for none."""
        if self.shard is None:
            return ()
        own = self.axes if self.shard_axis is None else _as_tuple(self.shard_axis)
        return tuple(a for a in self.axes if a in own)


def _as_tuple(axis: Any) -> tuple[str, ...]:
    return axis if isinstance(axis, tuple) else (axis,)
