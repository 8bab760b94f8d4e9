"""Which implementation of an op runs, with which configuration, and why."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from txcore import _compat
from txcore.kernels.dispatch import tuned
from txcore.kernels.dispatch.back_ends import BACK_ENDS, NAMES, PLATFORMS, resolve_pallas
from txcore.kernels.dispatch.back_ends import Implementation as Implementation
from txcore.kernels.dispatch.problem import Problem


@dataclass(frozen=True)
class Kernel:
    """Hold one implementation of an op.

    It is compiled for the platforms of its back end (`back_ends.PLATFORMS`). On another accelerator
    it is refused. On CPU it is interpreted, if it is named and `refuse` allows it.

    Args:
      run: `run(*operands, config=, **options)` computes the op on checked operands.
      configs: returns the configurations worth trying for a problem, the best guess first; (None,)
        for an implementation that has none.
      refuse: returns why it cannot run a problem, or None where it can.
    """

    run: Callable[..., Any]
    configs: Callable[[Problem], Sequence[Any]] = lambda problem: (None,)
    refuse: Callable[[Problem], str | None] = lambda problem: None


Kernels = Mapping[str, Kernel]  # by back end


@dataclass(frozen=True)
class Choice:
    """Hold the implementation that runs an op, and where the choice comes from."""

    implementation: str  # a back end
    config: Any
    source: str  # "given", a cache file's path, "recorded" or "heuristic"


def current_device() -> tuple[str, str]:
    """Return (platform, device kind) of the device for which an op is traced here."""
    given = _compat.mesh_device()  # of an abstract mesh, whose devices need not exist here
    if given is not None:
        return given
    device = _compat.setting("jax_default_device") or jax.devices()[0]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    return device.platform, device.device_kind


def choose_implementation(
    problem: Problem, kernels: Kernels, implementation: str | None, config: Any = None
) -> Choice:
    """Return the implementation that the caller names, or else the fastest one known.

    One that is named is never replaced by another. Without a name, the user's tuning file decides,
    then the times that come with txcore, then the best guess.

    Args:
      problem: what to compute, and where.
      kernels: the op's implementations by back end; every op has "xla".
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
                f"{op}: config= needs implementation= with it, got {config!r} alone: name the "
                "implementation that it configures"
            )
        return _choose_fastest(problem, kernels)
    if implementation not in NAMES:
        raise ValueError(
            f"{op}: implementation needs to be None or one of {', '.join(map(repr, NAMES))}, "
            f"got {implementation!r}: {_name_able(problem, kernels)}"
        )
    name = resolve_pallas(implementation, problem.platform, kernels)
    reason = _explain_refusal(problem, kernels, name)
    if reason is not None:
        raise NotImplementedError(
            f"{op}: implementation={implementation!r} was asked for, but {reason}: "
            f"{_name_able(problem, kernels)}"
        )
    guess = kernels[name].configs(problem)[0]
    if config is not None and type(config) is not type(guess):
        wanted = "no config" if guess is None else f"config= a {_name_class(guess)}"
        raise TypeError(
            f"{op}: implementation={implementation!r} needs {wanted}, got {_name_class(config)}: "
            "leave config out for the best guess"
        )
    return Choice(name, guess if config is None else config, "given")


def _name_class(config: Any) -> str:
    """Name a configuration's class with its module: several implementations have a `Config`."""
    kind = type(config)
    module = kind.__module__.removeprefix("txcore.kernels.")
    return kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"


def _name_able(problem: Problem, kernels: Kernels) -> str:
    """Say what to do: which implementations can compute a problem on its platform."""
    able = [name for name in kernels if _explain_refusal(problem, kernels, name) is None]
    return f"pass {' or '.join(map(repr, able))}, or leave implementation out to have one chosen"


def _explain_refusal(problem: Problem, kernels: Kernels, name: str) -> str | None:
    if name == "pallas":
        return f"{problem.op} has no Pallas kernel for {problem.platform}"
    if name not in kernels:
        return f"{problem.op} has no {name} kernel"
    reason = kernels[name].refuse(problem)
    if reason is None and problem.platform != "cpu" and not is_compiled(problem, name):
        return (
            f"its kernel is compiled for {' and '.join(PLATFORMS[name] or ())}, and on "
            f"{problem.platform} it would be interpreted, which is for tests on CPU"
        )
    return reason


def _choose_fastest(problem: Problem, kernels: Kernels) -> Choice:
    for source, entry in tuned.find_entries(problem):
        name = entry.implementation
        refused = _explain_refusal(problem, kernels, name) is not None
        if refused or not is_compiled(problem, name):
            continue
        configs = kernels[name].configs(problem)
        config = tuned.config_of(configs[0], problem.key, source, entry)
        # A configuration measured for another problem of the class may not fit this one.
        if config in configs:
            return Choice(name, config, source)
    return Choice("xla", kernels["xla"].configs(problem)[0], "heuristic")


def is_compiled(problem: Problem, name: str) -> bool:
    """Tell whether a back end compiles for a problem's platform."""
    platforms = PLATFORMS[name]
    return platforms is None or problem.platform in platforms


def list_candidates(
    problem: Problem, kernels: Kernels, named: Sequence[str] | None = None
) -> list[Choice]:
    """List the implementations and configurations that can run a problem.

    Args:
      problem: what to compute, and where.
      kernels: the op's implementations by name.
      named: the implementations to list, interpreted ones too; None for all that are compiled.

    Returns:
      The candidates, with the implementations in the order of `BACK_ENDS`.
    """
    asked = [resolve_pallas(name, problem.platform, kernels) for name in named or ()]
    found = []
    for name in BACK_ENDS:
        if _explain_refusal(problem, kernels, name) is not None:
            continue
        if is_compiled(problem, name) if named is None else name in asked:
            found += [Choice(name, config, "given") for config in kernels[name].configs(problem)]
    return found


Decide = Callable[[Problem, Kernels], Choice | None]
_DECIDE: ContextVar[Decide] = ContextVar("_DECIDE", default=lambda problem, kernels: None)


@contextlib.contextmanager
def decided_by(decide: Decide) -> Iterator[None]:
    """Let a function see every problem that is traced in this context, and choose for it.

    For measurements. The choice that it returns runs, whatever the call names; None leaves the
    choice to the registry. jax caches traces without regard to this context: trace a new function
    object in each one.

    Example:
      >>> import jax.numpy as jnp
      >>> from txcore import kernels
      >>> seen = []
      >>> with decided_by(lambda problem, kernels: seen.append(problem.op)):
      ...     out = kernels.dense(jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.zeros(4))
      >>> seen
      ['dense']
    """
    token = _DECIDE.set(decide)
    try:
        yield
    finally:
        _DECIDE.reset(token)


def run_op(
    op: str,
    kernels: Kernels,
    *operands: jax.Array,
    implementation: str | None,
    config: Any = None,
    **options: Any,
) -> Any:
    """Run an op by the implementation that `choose` gives.

    The operations are named "kernel.OP.IMPLEMENTATION" in the compiled program, for audits and
    profiles to show. The first operand has the same name (by `jax.ad_checkpoint.checkpoint_name`,
    which compiles to nothing): once for each call, so that an audit can count the calls.

    Args:
      op: the op's public name.
      kernels: its implementations.
      *operands: checked arrays that vary along the same mesh axes.
      implementation: as for `choose`.
      config: as for `choose`.
      **options: the op's static options, hashable.

    Returns:
      What the implementation returns.
    """
    problem = Problem.from_call(op, current_device(), operands, options)
    choice = _DECIDE.get()(problem, kernels) or choose_implementation(
        problem, kernels, implementation, config
    )
    name = f"kernel.{op}.{choice.implementation}"
    with jax.named_scope(name):
        first = checkpoint_name(operands[0], name)
        run = kernels[choice.implementation].run
        return run(first, *operands[1:], config=choice.config, **options)
