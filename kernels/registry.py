"""Which implementation of an op runs, with which configuration, and why."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax

from txcore import _compat
from txcore.kernels import tuning
from txcore.kernels.problem import Problem

Implementation = Literal["xla", "pallas", "triton"]
NAMES: tuple[Implementation, ...] = ("xla", "pallas", "triton")


@dataclass(frozen=True)
class Kernel:
    """Hold one implementation of an op.

    Args:
      run: `run(*operands, config=, **options)` computes the op on checked operands.
      configs: the configurations worth trying for a problem, the best guess first; (None,) for
        an implementation that has none.
      refuse: why it cannot run a problem, or None where it can.
    """

    run: Callable[..., Any]
    configs: Callable[[Problem], Sequence[Any]] = lambda problem: (None,)
    refuse: Callable[[Problem], str | None] = lambda problem: None


Kernels = Mapping[Implementation, Kernel]


@dataclass(frozen=True)
class Choice:
    """Hold what runs an op, and where the choice comes from."""

    implementation: Implementation
    config: Any
    source: str  # "given", a cache file's path, "recorded" or "heuristic"


def current_device() -> tuple[str, str]:
    """Return (platform, device kind) of the device for which an op is traced here."""
    given = _compat.mesh_device()  # its devices need not be here
    if given is not None:
        return given
    device = _compat.setting("jax_default_device") or jax.devices()[0]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    return device.platform, device.device_kind


def choose(
    problem: Problem, kernels: Kernels, implementation: str | None, config: Any = None
) -> Choice:
    """Return the implementation that was asked for, never another one, or else the fastest known.

    In this order: what the caller names, the tuning cache's entry for the problem's class, what
    was recorded for the device, and the best guess.

    Args:
      problem: what is to be computed, and where.
      kernels: the op's implementations by name; every op has "xla".
      implementation: one of `NAMES`, or None.
      config: a configuration of the implementation that is named, or None.

    Returns:
      The choice.

    Raises:
      ValueError: there is no implementation of that name for any op, or a configuration without
        an implementation.
      TypeError: a configuration of another implementation.
      NotImplementedError: this op has no implementation of that name, or it cannot run this.
    """
    op = problem.op
    if implementation is None:
        if config is not None:
            raise ValueError(
                f"{op}: config= needs implementation= with it, got {config!r} alone. Name the "
                "implementation that it configures."
            )
        return _fastest(problem, kernels)
    if implementation not in NAMES:
        raise ValueError(
            f"{op}: implementation must be None or one of {', '.join(map(repr, NAMES))}; "
            f"got {implementation!r}. Leave it out to have one chosen."
        )
    reason = _why_not(problem, kernels, implementation)
    if reason is not None:
        able = [name for name in kernels if _why_not(problem, kernels, name) is None]
        raise NotImplementedError(
            f"{op}: implementation={implementation!r} was asked for, but {reason}. "
            f"Pass {' or '.join(map(repr, able))}, or leave implementation out to have one chosen."
        )
    name: Implementation = implementation  # type: ignore[assignment]
    guess = kernels[name].configs(problem)[0]
    if config is not None and type(config) is not type(guess):
        wanted = "no config" if guess is None else f"config= a {type(guess).__qualname__}"
        raise TypeError(
            f"{op}: implementation={name!r} takes {wanted}, got {type(config).__qualname__}."
        )
    return Choice(name, guess if config is None else config, "given")


def _why_not(problem: Problem, kernels: Kernels, name: str) -> str | None:
    if name not in kernels:
        return f"{problem.op} has no {name} kernel"
    return kernels[name].refuse(problem)  # type: ignore[index]


def _fastest(problem: Problem, kernels: Kernels) -> Choice:
    for found in tuning.lookup(problem):
        if _why_not(problem, kernels, found.implementation) is None:
            guess = kernels[found.implementation].configs(problem)[0]
            config = None if guess is None else tuning.config_of(type(guess), found)
            return Choice(found.implementation, config, found.source)
    return Choice("xla", kernels["xla"].configs(problem)[0], "heuristic")


def run(
    op: str,
    kernels: Kernels,
    *operands: jax.Array,
    implementation: str | None,
    config: Any = None,
    **options: Any,
) -> Any:
    """Run an op by the implementation that `choose` gives.

    The operations are named "kernel.OP.IMPLEMENTATION" in the compiled program, for an audit and
    a profile to show.

    Args:
      op: the op's public name.
      kernels: its implementations.
      *operands: checked arrays, which vary along the same axes.
      implementation: as for `choose`.
      config: as for `choose`.
      **options: the op's static options, hashable.

    Returns:
      What the implementation returns.
    """
    problem = Problem.of(op, current_device(), operands, options)
    choice = choose(problem, kernels, implementation, config)
    with jax.named_scope(f"kernel.{op}.{choice.implementation}"):
        return kernels[choice.implementation].run(*operands, config=choice.config, **options)
