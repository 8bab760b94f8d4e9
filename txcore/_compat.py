"""Every difference between the supported jax versions (0.10 to 0.12), and nothing else."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

TAG_KEY = "txcore"  # the frontend attribute that carries a collective's tag into HLO


def varying_axes(x: Any) -> frozenset[str]:
    """Return the mesh axes along which the type of `x` says that it varies."""
    aval = jax.typeof(x)
    manual = getattr(aval, "manual_axis_type", None)
    if manual is not None:
        return frozenset(manual.varying)
    return frozenset(getattr(aval, "vma", None) or ())


def cast_to_varying(x: Any, axes: tuple[str, ...]) -> jax.Array:
    """Cast one array to vary along `axes`, none of which it varies along yet."""
    return lax.pcast(x, axes, to="varying")


def tracks_varying(axis: str) -> bool:
    """Tell whether jax tracks varying axes here (not under check_vma=False or vmap)."""
    # The index along an axis varies along it by definition: if its type does not say so,
    # nothing's type does.
    index = jax.eval_shape(lambda: lax.axis_index(axis))
    return axis in varying_axes(index)


def bound_axes() -> tuple[str, ...]:
    """Return the names of the mesh axes that are bound (manual) where this is called."""
    return tuple(str(a) for a in getattr(jax.sharding.get_abstract_mesh(), "manual_axes", ()))


def eqn_tag(eqn: Any) -> str | None:
    """Return the txcore tag on a jaxpr equation, or None."""
    metadata: Mapping[str, Any] | None = getattr(
        getattr(eqn, "ctx", None), "xla_metadata", None
    )
    return metadata.get(TAG_KEY) if metadata else None


def simulate_cpu_devices(count: int) -> None:
    """Make the CPU platform show `count` devices; call it before any backend starts.

    Raises:
      RuntimeError: a backend has started already.
    """
    jax.config.update("jax_num_cpu_devices", count)


def backend_started() -> bool:
    """Tell whether jax has started a backend (afterwards device counts are fixed)."""
    from jax._src import xla_bridge  # private: no public question exists on 0.10 to 0.12

    started = getattr(xla_bridge, "backends_are_initialized", None)
    return bool(started()) if started is not None else False


def is_key_array(x: Any) -> bool:
    """Tell whether `x` is an array of typed PRNG keys."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
