"""Load parameters from a checkpoint, for inference or as the start of another run."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from txcore.train.checkpoints import best as metric
from txcore.train.checkpoints import folder, layers, manifest, saved_leaves
from txcore.train.checkpoints.manifest import CheckpointError, Leaf, Manifest
from txcore.train.checkpoints.orbax_store import read_arrays

_LOG = logging.getLogger("txcore")


def load_params(path: str | os.PathLike[str], params: Any, *, best: bool = False) -> Any:
    """Read the parameters of a checkpoint, whatever mesh, optimizer and precision it was made with.

    Every process reads by itself, even while a run writes. Files are compared with their digests
    first; a damaged checkpoint is logged, and the previous one is taken.

    Args:
      path: the folder of a run, or one checkpoint in it ("runs/a/step_00000100").
      params: pytree of arrays or shapes, as for `create_state`: the leaves to read, with their
        floating-point dtypes. It may lack leaves of the checkpoint.
      best: take the best by the metric of `Checkpoints(keep_best=)` instead of the newest.

    Returns:
      The pytree with NumPy arrays, for `engine.create_state` or `jax.device_put`.

    Raises:
      CheckpointError: there is no usable checkpoint, or a leaf is missing, or has another shape or
        a dtype that does not convert; the leaves are named.

    Example:
      >>> import tempfile
      >>> engine = tx.Engine(mesh=tx.MeshSpec(jax.devices()[:2]), optimizer=tx.optim.adamw(0.1),
      ...                    plan=tx.Plan(data_parallel=tx.DP("data")))
      >>> state = engine.create_state({"w": np.ones(3, np.float32)})
      >>> with tx.Checkpoints(tempfile.mkdtemp(), every=1) as checkpoints:
      ...     checkpoints.save(state, tx.train.Position(steps=1))
      >>> tx.load_params(checkpoints.directory, {"w": np.zeros(3, np.float16)})
      {'w': array([1., 1., 1.], dtype=float16)}
    """
    return _load_field(path, "stored_params", "params", params, best)


def load_extra(path: str | os.PathLike[str], extra: Any, *, best: bool = False) -> Any:
    """Read the `extra` of a checkpoint's state (batch statistics), as `load_params` does.

    Args:
      path: as for `load_params`.
      extra: pytree of arrays of the shapes and dtypes to return; may be a part of what was saved.
      best: as for `load_params`.

    Returns:
      `extra` with the values of the checkpoint, as NumPy arrays.

    Raises:
      CheckpointError: as `load_params`.

    Example:
      >>> import tempfile
      >>> engine = tx.Engine(mesh=tx.MeshSpec(jax.devices()[:2]), optimizer=tx.optim.sgd(0.1),
      ...                    plan=tx.Plan(data_parallel=tx.DP("data")))
      >>> extra = {"mean": np.ones(2, np.float32)}
      >>> state = engine.create_state({"w": np.zeros(3, np.float32)}, extra)
      >>> with tx.Checkpoints(tempfile.mkdtemp(), every=1) as checkpoints:
      ...     checkpoints.save(state, tx.train.Position(steps=1))
      >>> tx.load_extra(checkpoints.directory, {"mean": np.zeros(2, np.float32)})
      {'mean': array([1., 1.], dtype=float32)}
    """
    return _load_field(path, "extra", "extra", extra, best)


def _load_field(path: str | os.PathLike[str], field: str, what: str, like: Any, best: bool) -> Any:
    place = folder.absolute_path(path)
    single = (place / manifest.NAME).exists() or folder.is_checkpoint_name(place.name)
    problem = f"{place} has no checkpoint to load"
    for saved in [place] if single else _list_candidates(place, best):
        try:
            found = manifest.read_manifest(saved)
            manifest.verify_files(saved, found)
            return _read_leaves(saved, found, field, what, like)
        except _Unusable as error:
            raise CheckpointError(str(error)) from None
        except CheckpointError as error:
            problem = str(error)
            if not single:
                _LOG.warning("txcore: %s; trying the one before", error)
    raise CheckpointError(problem)


class _Unusable(CheckpointError):
    """The request does not fit the run; an older checkpoint would not fit it either."""


def _list_candidates(directory: Path, best: bool) -> list[Path]:
    names = folder.list_checkpoints(directory)
    if not best:
        return [directory / name for name in names]
    found = metric.metrics_in(directory, reversed(names))
    if not found:
        raise CheckpointError(
            f"no checkpoint in {directory} has a metric: train with Checkpoints(keep_best=), or "
            "leave out best=True for the newest"
        )
    latest = found[-1][1]  # says by which metric the run keeps its best
    order: list[Path] = []
    while (one := metric.best_of(found, *latest[:2])) is not None:
        order.append(directory / one[0])
        found.remove(one)
    return order


def _read_leaves(saved: Path, found: Manifest, field: str, what: str, like: Any) -> Any:
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    wanted = [(jax.tree_util.keystr(path), _with_shape(leaf)) for path, leaf in leaves]
    places = {leaf.path: i for i, leaf in enumerate(found.leaves)}
    problems = [_describe_problem(found.leaves, places, field, what, name, x) for name, x in wanted]
    if texts := [text for text in problems if text is not None]:
        more = [f"and {len(texts) - 3} more"] if len(texts) > 4 else []
        raise _Unusable(
            f"{saved} does not hold these {what}: {'; '.join(texts[: 3 if more else 4] + more)}. "
            f"Give {what} like those that it was saved from, or a part of them"
        )
    numbers = {
        name: saved_leaves.array_number(places[field + name]) for name, x in wanted if x.size
    }
    arrays = read_arrays(saved, list(numbers.values())) if numbers else {}
    read = {name: np.asarray(arrays[number]) for name, number in numbers.items()}
    for name, values in read.items():
        if not _is_finite(values):
            raise CheckpointError(f"{saved} holds values that are not finite, in {what}{name}")
    return jax.tree.unflatten(
        structure, [_convert_leaf(x, read.get(n), what + n) for n, x in wanted]
    )


def _with_shape(leaf: Any) -> Any:
    return leaf if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else np.asarray(leaf)


def _describe_problem(
    leaves: tuple[Leaf, ...], places: Mapping[str, int], field: str, what: str, name: str, x: Any
) -> str | None:
    if field + name not in places:
        return f"{what}{name} ({saved_leaves.kind_of(x)}) is not in it"
    kind = leaves[places[field + name]].kind
    dtype, _, shape = kind.partition("[")
    same = dtype == str(x.dtype) or (_is_float(dtype) and _is_float(x.dtype))
    if same and f"[{shape}" == str(list(x.shape)):
        return None
    here = f"{dtype}{list(x.shape)}"  # of a pipeline that a plan stores in chunks
    if same and any(layers.is_same(what + name, kind, here, dims) for dims in (1, 2)):
        return None
    return f"{what}{name} is {kind} in it and {saved_leaves.kind_of(x)} here"


def _is_float(dtype: Any) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:  # PRNG keys
        return False


def _is_finite(values: np.ndarray) -> bool:
    return not _is_float(values.dtype) or bool(np.isfinite(values).all())


def _convert_leaf(like: Any, read: np.ndarray | None, where: str) -> Any:
    """Return an array in the dtype of `like`; `read` is None for one without elements."""
    if read is None:
        return np.zeros(like.shape, like.dtype)
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return saved_leaves.with_keys(read, like)
    read = read.reshape(like.shape)
    with np.errstate(over="ignore"):
        cast = read.astype(like.dtype)
    if not _is_finite(cast):
        raise _Unusable(f"{where} holds values that {like.dtype} cannot: give a wider dtype")
    return cast
