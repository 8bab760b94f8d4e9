"""The vocabulary in parts: embedding, and the loss without ever holding all logits."""

import jax
import jax.numpy as jnp
from jax import lax

from txcore.collectives import axis_index, axis_size, pmax, reduce_scatter
from txcore.kernels.common.checks import accumulator
from txcore.parallel.tensor.pair import check_part, leave, split_axes


def embedding(
    tokens: jax.Array,
    table: jax.Array,
    *,
    axis: str,
    scatter_dim: int | None = None,
    name: str = "embedding",
) -> jax.Array:
    """Look tokens up in a table of which each device holds some rows.

    Equation: `y = concatenate(table[0] ... table[n-1], 0)[tokens]`: each device looks up what it
    has, with zeros for the rest, and the parts are summed.

    Transpose: each device adds the cotangents of its own rows up; nothing is sent (with
    `scatter_dim` the cotangent is gathered first).

    Args:
      tokens: integers of any shape in [0, vocabulary), the same on every device along `axis`.
      table: shape (vocabulary / n, features): this device's rows.
      axis: the mesh axis over which the vocabulary is split, of n devices.
      scatter_dim: the dim of `tokens` along which the result is split over the devices (sequence
        parallelism).
      name: label of the operation's tag.

    Returns:
      Shape (*tokens.shape, features), the same on every device; with `scatter_dim` its shard. A
      token outside of the vocabulary gives NaN: what it is is known only when the program runs.

    Raises:
      TypeError: `tokens` are not integers.
      ValueError: `table` is the same on every device, or the devices do not divide `scatter_dim`.
      NameError: `axis` is not bound here.

    Example:
      >>> def f(tokens, table):
      ...     return tx.tensor.embedding(tokens, table, axis="model")
      >>> table = np.arange(8, dtype=np.float32).reshape(4, 2)
      >>> tx.testing.run_sharded(f, np.array([3, 0]), table, axes={"model": 2},
      ...                        in_specs=(P(), P("model")), out_specs=P())
      array([[6., 7.],
             [0., 1.]], dtype=float32)

    References:
      Shoeybi et al., Megatron-LM, 2019, section 3.
    """
    op = "tensor.embedding"
    axes = split_axes(op, axis)
    _check_integers(op, "tokens", tokens)
    check_part(op, "table", table, axes, 0)
    rows = table.shape[0]
    whole = rows * (axis_size(axis) if axes else 1)
    local, is_here = _own_places(tokens, rows, axis if axes else None)
    found = jnp.where(is_here[..., None], table[local], jnp.zeros((), table.dtype))
    known = (tokens >= 0) & (tokens < whole)
    found = jnp.where(known[..., None], found, jnp.nan)
    if not axes:
        return found
    if scatter_dim is not None:
        return reduce_scatter(found, axis, dim=scatter_dim, name=name)
    return leave(found, axis, name=name)


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    axis: str,
    label_smoothing: float = 0.0,
    name: str = "cross_entropy",
) -> jax.Array:
    """Compute the softmax cross-entropy of each example, of logits in parts.

    Equation: `loss = log(sum_j exp(logits[j])) - logits[label]`, in float32 or wider, over the
    whole vocabulary; with `label_smoothing` as `txcore.kernels.cross_entropy`. What is sent is one
    maximum and two or three sums an example: no device ever holds another's logits.

    Transpose: `softmax - one_hot` of this device's own logits; nothing is sent.

    Args:
      logits: shape (..., vocabulary / n): this device's part.
      labels: integers in [0, vocabulary) of shape (...), the same on every device along `axis`.
      axis: the mesh axis over which the vocabulary is split, of n devices.
      label_smoothing: from 0 to below 1.
      name: label of the operations' tags.

    Returns:
      Shape (...), float32 or wider, the same on every device. A label outside of the vocabulary
      gives NaN.

    Raises:
      TypeError: `labels` are not integers.
      ValueError: `logits` are the same on every device, or the shapes do not fit.
      NameError: `axis` is not bound here.

    Example:
      >>> def f(logits, labels):
      ...     return tx.tensor.cross_entropy(logits, labels, axis="model")
      >>> logits = np.log(np.array([[1.0, 1.0, 2.0, 4.0]], np.float32))
      >>> loss = tx.testing.run_sharded(f, logits, np.array([3]), axes={"model": 2},
      ...                               in_specs=(P(None, "model"), P()), out_specs=P())
      >>> np.exp(-loss).round(6)
      array([0.5], dtype=float32)

    References:
      Shoeybi et al., Megatron-LM, 2019, section 3.
    """
    op = "tensor.cross_entropy"
    axes = split_axes(op, axis)
    _check_integers(op, "labels", labels)
    check_part(op, "logits", logits, axes, logits.ndim - 1)
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"{op} needs labels of the shape of logits without their last dim, "
            f"{logits.shape[:-1]}, got {labels.shape}"
        )
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{op} needs label_smoothing= from 0 to below 1, got {label_smoothing}")
    logits = logits.astype(accumulator(logits.dtype))
    columns = logits.shape[-1]
    whole = columns * (axis_size(axis) if axes else 1)

    highest = jnp.max(lax.stop_gradient(logits), axis=-1)
    if axes:
        highest = pmax(highest, axis, name=f"{name}.max")
    highest = jnp.where(jnp.isfinite(highest), highest, 0)

    local, is_here = _own_places(labels, columns, axis if axes else None)
    of_label = jnp.take_along_axis(logits, local[..., None], axis=-1)[..., 0]
    sums = [
        jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1),
        jnp.where(is_here, of_label, 0),
    ]
    if label_smoothing:
        sums.append(jnp.sum(logits, axis=-1))
    if axes:
        sums = list(leave(jnp.stack(sums), axis, name=f"{name}.sums"))
    normaliser = jnp.log(sums[0]) + highest
    loss = normaliser - sums[1]
    if label_smoothing:
        of_all = normaliser - sums[2] / whole
        loss = (1 - label_smoothing) * loss + label_smoothing * of_all
    return jnp.where((labels >= 0) & (labels < whole), loss, jnp.nan)


def _own_places(indices: jax.Array, length: int, axis: str | None) -> tuple[jax.Array, jax.Array]:
    """Return where indices into the whole lie in this device's part, and whether they do."""
    first = length * axis_index(axis) if axis is not None else 0
    local = indices - first
    is_here = (local >= 0) & (local < length)
    return jnp.where(is_here, local, 0), is_here


def _check_integers(op: str, what: str, x: jax.Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{op} needs {what} to be integers, got {x.dtype}: cast them first")
