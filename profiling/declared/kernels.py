"""List the kernels of txcore that a program calls, by the names that they leave in it."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from txcore import _compat
from txcore.profiling.declared.equations import Jaxpr, open_jaxpr, sub_jaxprs

_NAME = re.compile(r"kernel\.([A-Za-z0-9_]+\.[A-Za-z0-9_]+)")
# In HLO it is one step of an op's path, which autodiff and vmap wrap: "transpose(jvp(kernel.a.b))".
_IN_PATH = re.compile(rf'(?<=[/("]){_NAME.pattern}(?=[/)"])')


@dataclass(frozen=True)
class KernelUse:
    """One implementation of one op in a program.

    Attributes:
      name: the op and its implementation: "conv2d.xla".
      calls: how often the traced program computes its forward pass, a loop's body taken once, and
        the recomputation of `jax.checkpoint` counted again; the backward pass is part of the
        call. None where only the compiled program is known: its operations do not tell how many
        calls they belong to.
    """

    name: str
    calls: int | None

    def __str__(self) -> str:
        return self.name if self.calls is None else f"{self.name} x{self.calls}"


def kernels_used(jaxpr: Jaxpr) -> tuple[KernelUse, ...]:
    """Count the kernel calls of a traced program.

    Args:
      jaxpr: as `jax.jit(f).trace(*args).jaxpr`.

    Returns:
      The kernels, in the order in which the program first calls them.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from txcore import kernels
      >>> def loss(w, x):
      ...     hidden = kernels.dense(x, w, jnp.zeros(4))
      ...     return kernels.dense(hidden, w, jnp.zeros(4)).sum()
      >>> w, x = jnp.ones((4, 4)), jnp.ones((2, 4))
      >>> for use in kernels_used(jax.jit(jax.grad(loss)).trace(w, x).jaxpr):
      ...     print(use)
      dense.xla x2
    """
    live = _compat.live_jaxpr(open_jaxpr(jaxpr))
    counted = Counter(_list_calls(live))
    return tuple(KernelUse(name, calls) for name, calls in counted.items())


def _list_calls(jaxpr: Jaxpr) -> Iterator[str]:
    """Yield the name of each call: its first operand is marked with it, by `checkpoint_name`.

    Name stacks cannot tell two calls of one op apart, and differentiating drops the call itself.
    """
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "name" and (found := _NAME.fullmatch(eqn.params["name"])):
            yield found[1]
        for inner in sub_jaxprs(eqn):
            yield from _list_calls(inner)


def kernels_in_text(hlo: str) -> tuple[KernelUse, ...]:
    """List the kernels whose names are in the text of a compiled program, in their order.

    Example:
      >>> kernels_in_text('op_name="jit(f)/transpose(jvp(kernel.dense.xla))/dot_general"')
      (KernelUse(name='dense.xla', calls=None),)
    """
    return tuple(KernelUse(name, None) for name in dict.fromkeys(_IN_PATH.findall(hlo)))


def kernels_line(used: Iterable[KernelUse]) -> str:
    """Write the kernels of a program in one line: "conv2d.xla x2, dense.xla x1"."""
    return ", ".join(map(str, used))
