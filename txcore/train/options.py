"""The options of an engine, checked, as one frozen value."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from txcore import _compat
from txcore.kernels import compiler_options as fastest_options
from txcore.kernels.common.checks import whole_number
from txcore.mesh import MeshSpec
from txcore.optim import as_optimizer
from txcore.optim.optimizer import Optimizer
from txcore.plan.plan import Plan
from txcore.printing import format_call
from txcore.train.loggers import Logger
from txcore.train.numerics import nonfinite
from txcore.train.numerics.precision import Precision

CACHE_VARIABLE = "TXCORE_CACHE"


@dataclass(frozen=True)
class Options:
    """Hold the options of an engine.

    Attributes:
      mesh: the devices and their axes.
      plan: what is parallel over which axis.
      optimizer: as given; a `tx.optim.Optimizer` once it is checked.
      loggers: functions of a record, kept as a tuple.
      precision: the dtype in which steps compute.
      seed: from 0 to 2**32 - 1.
      on_nonfinite: what to do about a NaN or infinity.
      compiler_options: XLA options for the steps; None for the fastest known.
      lock: the lock file whose program training steps have to be; None for that of the run, if any.

    Raises:
      TypeError, ValueError: as `Engine` says.
    """

    mesh: MeshSpec
    plan: Plan
    optimizer: Optimizer
    loggers: Sequence[Logger]
    precision: Precision
    seed: int
    on_nonfinite: nonfinite.Policy
    compiler_options: Mapping[str, Any] | None
    lock: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, MeshSpec):
            raise TypeError(
                f"Engine needs mesh= a tx.MeshSpec, got {type(self.mesh).__name__}: write "
                "tx.MeshSpec(devices=..., axes=..., shape=...)"
            )
        if not isinstance(self.plan, Plan):
            raise TypeError(f"Engine needs plan= a tx.Plan, got {type(self.plan).__name__}")
        seed = whole_number(self.seed)
        if seed is None or not 0 <= seed < 2**32:
            raise ValueError(f"Engine needs seed= an int from 0 to 2**32 - 1, got {self.seed}")
        nonfinite.check_policy(self.on_nonfinite)
        self.plan.validate(self.mesh)
        if callable(self.loggers):
            raise TypeError("Engine needs loggers= a list of loggers, got one: write [logger]")
        use_cache()
        self._set("seed", seed)
        self._set("optimizer", as_optimizer(self.optimizer))
        self._check_compression()
        self._set("loggers", tuple(self.loggers))

    def _check_compression(self) -> None:
        compression = self.plan.sync_options.get("compression")
        if compression is not None and self.optimizer.per_example:
            raise ValueError(
                "Engine needs DP(...) of compression=None with an optimizer of per_example=True, "
                f"got {compression}: each example's gradient is gathered, and none is averaged"
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def xla_options(self) -> dict[str, Any]:
        """The XLA options that steps are compiled with."""
        if self.compiler_options is None:
            platform = self.mesh.devices[0].platform
            return fastest_options(platform, self.precision.compute)
        return dict(self.compiler_options)

    @property
    def spans_processes(self) -> bool:
        """Whether the mesh has devices of several processes."""
        return len({device.process_index for device in self.mesh.devices}) > 1


def use_cache() -> None:
    """Keep compiled programs in the folder that TXCORE_CACHE names, if it does.

    Raises:
      ValueError: it cannot be written.
    """
    name = os.environ.get(CACHE_VARIABLE)
    if not name:
        return
    try:
        folder = pathlib.Path(name).expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK) else "permission denied"
    except (OSError, RuntimeError) as error:  # RuntimeError: no such user's home
        reason = (getattr(error, "strerror", None) or str(error)).lower().rstrip(".")
    if reason:
        raise ValueError(
            f"{CACHE_VARIABLE} needs a folder that can be written, got {name} ({reason}): name "
            "another, or leave it out"
        )
    _compat.use_persistent_cache(str(folder))


class OptionsView:
    """Show an engine's options as its attributes; all but the loggers can only be read."""

    def __init__(self, options: Options) -> None:
        self._options = options

    def __repr__(self) -> str:
        precision = self.precision
        is_plain = precision == Precision(precision.compute)
        return format_call(
            "Engine",
            mesh=(self.mesh, None),
            plan=(self.plan, None),
            optimizer=(self.optimizer, None),
            loggers=(self.loggers, ()),
            precision=(precision.compute if is_plain else precision, "float32"),
            seed=(self.seed, 0),
            on_nonfinite=(self.on_nonfinite, "stop"),
            compiler_options=(self._options.compiler_options, None),
            lock=(self._options.lock, None),
        )

    @property
    def mesh(self) -> MeshSpec:
        """The devices and their axes."""
        return self._options.mesh

    @property
    def plan(self) -> Plan:
        """What is parallel over which axis."""
        return self._options.plan

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer; of an optax transformation, what runs it."""
        return self._options.optimizer

    @property
    def precision(self) -> Precision:
        """The precision policy."""
        return self._options.precision

    @property
    def seed(self) -> int:
        """The seed of new states."""
        return self._options.seed

    @property
    def on_nonfinite(self) -> nonfinite.Policy:
        """What to do about a NaN or infinity."""
        return self._options.on_nonfinite

    @property
    def loggers(self) -> Sequence[Logger]:
        """What `fit` calls with its records; may be set."""
        return self._options.loggers

    @loggers.setter
    def loggers(self, loggers: Sequence[Logger]) -> None:
        self._options = replace(self._options, loggers=loggers)

    @property
    def compiler_options(self) -> dict[str, Any]:
        """XLA options of the steps."""
        return self._options.xla_options
