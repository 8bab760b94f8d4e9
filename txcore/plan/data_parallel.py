"""Data parallelism: the batch is sharded, gradients are averaged, and state may be sharded too."""

from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Literal, get_args

from txcore.kernels.common.checks import whole_number
from txcore.optim import Optimizer
from txcore.parallel.gradients.algorithms import Name
from txcore.parallel.gradients.buckets import Buckets, as_buckets
from txcore.parallel.gradients.choice import check_algorithm, check_not_compressed
from txcore.parallel.gradients.compression import Compression, as_compression

Shard = Literal["optimizer", "gradients", "parameters"]
Reduction = Literal["mean", "adasum"]


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
      reshard_after_forward: of shard="parameters", whether what the forward pass gathers is let go
        and gathered again for the backward pass: False keeps all of it, for fewer bytes sent.
      reduction: how the devices' gradients become one: their "mean", or "adasum", which adds what
        is orthogonal and averages what is parallel (for a power of two devices).
      delay: 1 to update by the gradients of the step before, so that their exchange may overlap
        with this step's forward and backward pass; 0 by its own.
      sync_every: steps that each device makes by itself before parameters are averaged (local SGD);
        1 averages the gradients of each step.
      outer: with sync_every, an optimizer of `tx.optim` that takes the averaged change of the
        parameters as a gradient: sgd(0.1, momentum=0.9, nesterov=True) is DiLoCo for short rounds,
        with a rate of 0.7 for rounds of hundreds of steps. None takes the averaged parameters.
      compression: how gradients are averaged with fewer bytes: "bf16", "fp16", "int8" or what a
        function of `tx.compression` returns, as powersgd(rank=2) or top_k(). None: exactly. With
        shard="gradients" or "parameters" one that keeps nothing.
      buckets: MiB of the pieces in which gradients are exchanged, or `tx.Buckets(mb, first_mb)`;
        None leaves it to XLA to combine them.
      algorithm: how, as `tx.sync_gradients` has them: "plain", "chunked", "ring" ...; None for the
        fastest known.

    Example:
      >>> tx.DP(axis="data").axes
      ('data',)
    """

    axis: str | tuple[str, ...]
    _: KW_ONLY
    shard: Shard | None = None
    shard_axis: str | tuple[str, ...] | None = None
    reshard_after_forward: bool = True
    reduction: Reduction = "mean"
    delay: int = 0
    sync_every: int = 1
    outer: Optimizer | None = None
    compression: Compression | str | None = None
    buckets: Buckets | float | None = None
    algorithm: Name | None = None

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
        if not self.reshard_after_forward and self.shard != "parameters":
            raise ValueError(
                "DP needs shard='parameters' with reshard_after_forward=False, got "
                f"shard={self.shard!r}: nothing else is gathered in the forward pass"
            )
        self._check_less()
        self._check_compression()
        self._check_exchange()

    def _check_compression(self) -> None:
        compression = as_compression("DP", self.compression)
        scatters_early = self.shard in ("gradients", "parameters")
        if compression is not None and compression.has_state and scatters_early:
            raise ValueError(
                f"DP needs shard= 'optimizer' or None with compression={compression}, got "
                f"{self.shard!r}: what it keeps from step to step is as large on each device as "
                "all gradients, of which a device keeps a part there. Write 'bf16', 'fp16' or "
                "tx.compression.int8(feedback=False), which keep nothing"
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

    def _check_exchange(self) -> None:
        as_buckets("DP", self.buckets)
        check_algorithm("DP", self.algorithm, self.axes)
        check_not_compressed("DP", self.algorithm, self.compression)
        if self.buckets is not None and self.shard == "parameters":
            raise ValueError(
                f"DP needs buckets=None with shard='parameters', got {self.buckets!r}: there the "
                "layers are the pieces, each gathered and its gradients reduced by itself. Say "
                "in the model where they begin, by tx.zero.layers or tx.zero.layer of "
                "state.shards, or write shard='gradients'"
            )

    def _check_less(self) -> None:
        """Refuse what does not go together with less synchronisation."""
        if self.reduction not in get_args(Reduction):
            raise ValueError(f"DP needs reduction= 'mean' or 'adasum', got {self.reduction!r}")
        if whole_number(self.delay) not in (0, 1):
            raise ValueError(f"DP needs delay= 0 or 1 steps, got {self.delay!r}")
        every = whole_number(self.sync_every)
        if every is None or every < 1:
            raise ValueError(f"DP needs sync_every= steps from 1 on, got {self.sync_every!r}")
        if self.outer is not None and (
            not isinstance(self.outer, Optimizer) or self.outer.per_example
        ):
            raise TypeError(
                "DP needs outer= an optimizer of tx.optim (optax's by tx.optim.from_optax) that "
                f"takes one gradient a parameter, got {self.outer!r}"
            )
        if self.outer is not None and every == 1:
            raise ValueError(
                "DP needs sync_every= above 1 with outer=, got 1: gradients are averaged in each "
                "step, and the engine's optimizer takes them"
            )
        if every > 1:
            self._refuse_others(
                f"sync_every={every}",
                "no gradient is sent, and each device has parameters of its own, whole; write "
                "sync_every=1 to keep it",
                allowed=("axis", "sync_every", "outer"),
            )
        elif self.reduction == "adasum":
            self._refuse_others(
                "reduction='adasum'",
                "it has an exchange of its own, of whole float32 gradients; write reduction='mean' "
                "to keep it",
                allowed=("axis", "reduction", "delay"),
            )
        elif self.delay and self.shard in ("gradients", "parameters"):
            raise ValueError(
                f"DP needs shard= 'optimizer' or None with delay=1, got {self.shard!r}: there each "
                "gradient is reduced as soon as it is there, and none is left to wait"
            )

    def _refuse_others(self, option: str, reason: str, *, allowed: tuple[str, ...]) -> None:
        for f in fields(self):
            if f.name not in allowed and (value := getattr(self, f.name)) != f.default:
                raise ValueError(
                    f"DP needs {f.name}={f.default!r} with {option}, got {value!r}: {reason}"
                )

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes as a tuple."""
        return _as_tuple(self.axis)

    @property
    def averages_each_step(self) -> bool:
        """Whether each step takes the mean of its own gradients."""
        return self.sync_every == 1 and not self.delay and self.reduction == "mean"

    @property
    def shard_axes(self) -> tuple[str, ...]:
        """The axes over which state is split, as a tuple in the order of `axes`; () for none."""
        if self.shard is None:
            return ()
        own = self.axes if self.shard_axis is None else _as_tuple(self.shard_axis)
        return tuple(a for a in self.axes if a in own)


def _as_tuple(axis: Any) -> tuple[str, ...]:
    return axis if isinstance(axis, tuple) else (axis,)
