"""Find the arrays that several devices keep whole, though each could keep a part."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

_AT_LEAST = 1 << 20


@dataclass(frozen=True)
class Replicated:
    """An argument or result that is the same on all devices along some mesh axes.

    Attributes:
      path: where it is: "args[0]['w']", "kwargs['k']", "result[1]".
      shape: its global shape.
      dtype: "float32".
      bytes: on each device.
      axes: the mesh axes along which it is replicated.
      shard_axes: those of them that could shard it.
      shard_dim: the dim that they divide.
      saved_bytes: what each device would save.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    axes: tuple[str, ...]
    shard_axes: tuple[str, ...]
    shard_dim: int
    saved_bytes: int


def replicated(
    fn: Callable[..., Any] | jax.stages.Compiled, *args: Any, at_least: int = _AT_LEAST
) -> tuple[Replicated, ...]:
    """List the arguments and results that are replicated though they could be sharded.

    Plain data parallelism replicates parameters and optimizer state by design: for those the list
    tells what ZeRO would save. Results in the memory of a donated argument are left out.

    Args:
      fn: any jax function, jitted or not, or a compiled one.
      *args: its arguments; none with a compiled one.
      at_least: bytes on each device; arrays that would save less are left out.

    Returns:
      The arrays, the largest savings first. Nothing is executed.

    Raises:
      TypeError: arguments came with a compiled function.
      ValueError: `at_least` is negative.

    Example:
      >>> mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
      >>> whole = jax.NamedSharding(mesh, P())
      >>> w = jax.ShapeDtypeStruct((1024, 8), jnp.float32, sharding=whole)
      >>> [(r.path, r.axes, r.saved_bytes) for r in replicated(jnp.sum, w, at_least=1000)]
      [('args[0]', ('data',), 24576)]
    """
    if at_least < 0:
        raise ValueError(
            f"at_least needs a number of bytes of at least 0, but got {at_least}: give 0 for all "
            "arrays that could be sharded"
        )
    if isinstance(fn, jax.stages.Compiled):
        if args:
            raise TypeError(
                "replicated needs a compiled function alone, since it was compiled for its "
                f"arguments, but got {len(args)} more: call replicated(compiled)"
            )
        compiled = fn
    else:
        compiled = jax.jit(fn).lower(*args).compile()
    rows = (
        _describe_array(path, leaf, sharding) for path, leaf, sharding in _list_arrays(compiled)
    )
    found = [row for row in rows if row is not None and row.saved_bytes >= max(at_least, 1)]
    return tuple(sorted(found, key=lambda row: (-row.saved_bytes, row.path)))


def _list_arrays(compiled: jax.stages.Compiled) -> Iterator[tuple[str, Any, Any]]:
    """Yield path, shape and sharding of the arguments, and of results in memory of their own."""
    donated: Counter[Any] = Counter()
    for path, info, sharding in _pair_leaves(compiled.args_info, compiled.input_shardings):
        keys = jax.tree_util.keystr(path[1:])
        yield f"{'kwargs' if path[0].idx else 'args'}{keys}", info, sharding
        if info.donated:
            donated[_kind_of_array(info, sharding)] += 1
    for path, info, sharding in _pair_leaves(compiled.out_info, compiled.output_shardings):
        if donated[_kind_of_array(info, sharding)]:
            donated[_kind_of_array(info, sharding)] -= 1
        else:
            yield f"result{jax.tree_util.keystr(path)}", info, sharding


def _pair_leaves(infos: Any, shardings: Any) -> Iterator[tuple[Any, Any, Any]]:
    leaves = jax.tree_util.tree_flatten_with_path(infos)[0]
    structure: Any = jax.tree.structure(infos)
    # None is the sharding of an argument that jit dropped, and also what holds no leaf at all.
    beside = structure.flatten_up_to(shardings)
    for (path, info), sharding in zip(leaves, beside, strict=True):
        yield path, info, sharding


def _kind_of_array(info: Any, sharding: Any) -> Any:
    return info.shape, str(info.dtype), sharding


def _describe_array(path: str, info: Any, sharding: Any) -> Replicated | None:
    """Describe one array, or return None where it is not replicated or cannot be sharded."""
    axes = _replicated_axes(sharding)
    if not axes:  # also where jit dropped an argument that nothing uses: its sharding is None
        return None
    local = sharding.shard_shape(tuple(info.shape))
    size = math.prod(local) * _bytes_of_element(info.dtype)
    choice = _find_best_split(local, axes)
    if choice is None:
        return None
    chosen, dim = choice
    saved = size - size // math.prod(axes[axis] for axis in chosen)
    return Replicated(
        path, tuple(info.shape), str(info.dtype), size, tuple(axes), chosen, dim, saved
    )


def _replicated_axes(sharding: Any) -> Mapping[str, int]:
    """Return the axes along which an array is the same, and their sizes."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        used = {n for part in sharding.spec for n in (part if isinstance(part, tuple) else (part,))}
        shape: Mapping[str, int] = sharding.mesh.shape
        return {name: n for name, n in shape.items() if n > 1 and name not in used}
    devices = getattr(sharding, "num_devices", 1)
    return {"devices": devices} if devices > 1 and sharding.is_fully_replicated else {}


def _bytes_of_element(dtype: Any) -> int:
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        key = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), dtype))
        return int(key.size * key.dtype.itemsize)
    return int(np.dtype(dtype).itemsize)


def _find_best_split(
    local: tuple[int, ...], axes: Mapping[str, int]
) -> tuple[tuple[str, ...], int] | None:
    """Return the axes that cut an array into the most parts, and the largest dim they divide."""
    best: tuple[tuple[str, ...], int] | None = None
    most = (1, 0)
    for number in range(1, len(axes) + 1):
        for chosen in itertools.combinations(axes, number):
            parts = math.prod(axes[axis] for axis in chosen)
            for dim, size in enumerate(local):
                if size and size % parts == 0 and (parts, size) > most:
                    best, most = (chosen, dim), (parts, size)
    return best
