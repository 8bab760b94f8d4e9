"""vary: type a value as varying along an axis; nothing is sent."""

from typing import Any

import jax

from txcore.collectives import _leaves
from txcore.collectives._calls import explain_calls
from txcore.collectives._leaves import Leaf
from txcore.step_scope import left_out_axes


@explain_calls
def vary(x: Any, axis: str | tuple[str, ...], *, name: str | None = None) -> Any:
    """Type `x` as varying along `axis`, without changing a value (Megatron's f).

    Equation: `y[i] = x`. Also named `pvary`.

    Transpose: `psum` over those axes that were added, under this call's tag; identity with
    check_vma=False. Cast parameters before differentiating to get local gradients and reduce
    them once, yourself.

    Args:
      x: pytree of arrays. Axes that a leaf varies along already are left as they are.
      axis: mesh axis name, or a tuple of names.
      name: label of the transpose's tag; letters, digits and `_ . / -`.

    Returns:
      `x`, typed as varying. Unchanged where jax does not track varying axes, and along axes
      of size 1 inside an engine's step, which leaves these out of the program.

    Raises:
      TypeError: a leaf is no array.
      NameError: `axis` is not bound here.

    Example:
      >>> def f(x):
      ...     return tx.vary(jax.numpy.float32(1), "data") * x
      >>> tx.testing.run_sharded(f, np.arange(4.0), axes={"data": 4})
      array([0., 1., 2., 3.], dtype=float32)

    References:
      Shoeybi et al., Megatron-LM, 2019, section 3 (the conjugate f and g).
    """
    axes = tuple(a for a in _leaves.check_axes("vary", axis) if a not in left_out_axes())

    def vary_one_leaf(leaf: Leaf) -> jax.Array:
        _leaves.refuse_unreduced("vary", leaf, axes)
        return _leaves.vary_leaf(leaf.value, axes)

    return _leaves.map_leaves("vary", x, vary_one_leaf, name=name, verb="vary")


pvary = vary
