"""Dense layers in parts: by columns, then by rows, with one sum for both."""

import jax

from txcore.collectives import all_gather, reduce_scatter
from txcore.collectives._algorithms import Algorithm, check_algorithm
from txcore.parallel.tensor import overlap as rings
from txcore.parallel.tensor.pair import check_part, enter, leave, split_axes
from txcore.parallel.tensor.product import multiply


def column_dense(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array | None = None,
    *,
    axis: str,
    gather_dim: int | None = None,
    overlap: bool = False,
    algorithm: Algorithm | None = None,
    name: str = "column",
) -> jax.Array:
    """Compute this device's columns of a dense layer.

    Equation: `y[i] = x @ w[i] + b[i]`, with `w = concatenate(w[0] ... w[n-1], 1)`. With
    `gather_dim`, `x` is the concatenation of the devices' sequence shards (sequence parallelism).

    Transpose: the cotangent of `x` is a sum over the devices: a `psum` (of `enter`), or with
    `gather_dim` a reduce-scatter.

    Args:
      x: shape (..., in), the same on every device along `axis`; with `gather_dim` this device's
        shard of it along that dim.
      w: shape (in, out / n): this device's columns.
      b: shape (out / n,), or None.
      axis: the mesh axis over which the layer is split, of n devices.
      gather_dim: the dim of `x` along which it is gathered first; not the last.
      overlap: with `gather_dim`, send one shard on while another is multiplied, in both directions
        of a ring, in place of one all-gather before one product.
      algorithm: of the ring: None for permutes and products of XLA's, "remote_dma" for one Pallas
        kernel on TPU (`kernels.ring_all_gather_matmul`).
      name: label of the operations' tags.

    Returns:
      Shape (..., out / n), this device's columns.

    Raises:
      ValueError: `w` or `b` is the same on every device, `gather_dim` is the last dim, or `overlap`
        comes without it.
      NameError: `axis` is not bound here.

    Example:
      >>> def f(x, w):
      ...     return tx.tensor.column_dense(x, w, axis="model")
      >>> x, w = np.ones((1, 2), np.float32), np.arange(8, dtype=np.float32).reshape(2, 4)
      >>> tx.testing.run_sharded(f, x, w, axes={"model": 2}, in_specs=(P(), P(None, "model")),
      ...                        out_specs=P(None, "model"))
      array([[ 4.,  6.,  8., 10.]], dtype=float32)

    References:
      Shoeybi et al., Megatron-LM, 2019, section 3; Korthikanti et al., "Reducing activation
      recomputation in large transformer models", 2022 (sequence parallelism); Wang et al.,
      "Overlap communication with dependent computation via decomposition", 2023.
    """
    op = "tensor.column_dense"
    axes = split_axes(op, axis)
    check_part(op, "w", w, axes, 1)
    if b is not None:
        check_part(op, "b", b, axes, 0)
    dim = _check_dim(op, "gather_dim", gather_dim, overlap, x, algorithm)
    if dim is None:
        y = multiply(enter(x, axis, name=name), w)
    elif overlap and axes:
        y = rings.gather_and_multiply(x, w, axis, dim, name, algorithm)
    else:
        y = multiply(all_gather(x, axis, dim=dim, name=name), w)
    return y if b is None else y + b


def row_dense(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array | None = None,
    *,
    axis: str,
    scatter_dim: int | None = None,
    overlap: bool = False,
    algorithm: Algorithm | None = None,
    name: str = "row",
) -> jax.Array:
    """Compute a dense layer of which each device has some of the input features.

    Equation: `y = sum_i x[i] @ w[i] + b`, with `w = concatenate(w[0] ... w[n-1], 0)`. The bias is
    added once, after the sum. With `scatter_dim` each device keeps its shard of `y` along that dim.

    Transpose: the cotangent goes to every device (of `leave`: nothing is sent), or with
    `scatter_dim` an all-gather. That of `b` is then a sum over the shards: a `psum`, tagged.

    Args:
      x: shape (..., in / n): this device's features, as `column_dense` returns them.
      w: shape (in / n, out): this device's rows.
      b: shape (out,), the same on every device, or None.
      axis: the mesh axis over which the layer is split, of n devices.
      scatter_dim: the dim of the result along which it is split over the devices; not the last.
      overlap: with `scatter_dim`, send one shard's sum on while another's is computed, in both
        directions of a ring, in place of one product before one reduce-scatter.
      algorithm: of the ring: None for permutes and products of XLA's, "remote_dma" for one Pallas
        kernel on TPU (`kernels.ring_matmul_reduce_scatter`).
      name: label of the operations' tags.

    Returns:
      Shape (..., out), the same on every device; with `scatter_dim` this device's shard.

    Raises:
      ValueError: `w` is the same on every device, `scatter_dim` is the last dim or the devices do
        not divide it, or `overlap` comes without it.
      NameError: `axis` is not bound here.

    Example:
      >>> def f(x, w):
      ...     return tx.tensor.row_dense(x, w, axis="model")
      >>> x, w = np.ones((1, 4), np.float32), np.arange(8, dtype=np.float32).reshape(4, 2)
      >>> tx.testing.run_sharded(f, x, w, axes={"model": 2}, out_specs=P(),
      ...                        in_specs=(P(None, "model"), P("model")))
      array([[12., 16.]], dtype=float32)

    References:
      As `column_dense`.
    """
    op = "tensor.row_dense"
    axes = split_axes(op, axis)
    check_part(op, "w", w, axes, 0)
    dim = _check_dim(op, "scatter_dim", scatter_dim, overlap, x, algorithm)
    if dim is None:
        y = leave(multiply(x, w), axis, name=name)
        return y if b is None else y + b
    if overlap and axes:
        y = rings.multiply_and_scatter(x, w, axis, dim, name, algorithm)
    elif axes:
        y = reduce_scatter(multiply(x, w), axis, dim=dim, name=name)
    else:
        y = multiply(x, w)
    return y if b is None else y + enter(b, axis, name=f"{name}_bias")


def _check_dim(
    op: str,
    option: str,
    dim: int | None,
    overlap: bool,
    x: jax.Array,
    algorithm: Algorithm | None,
) -> int | None:
    """Return the dim of the sequence counted from the front."""
    check_algorithm(op, algorithm)
    if algorithm and not overlap:
        raise ValueError(
            f"{op} needs overlap=True with algorithm={algorithm!r}, got False: it is of the ring "
            "that overlaps"
        )
    if dim is None:
        if overlap:
            raise ValueError(
                f"{op} needs {option}= the sequence's dim with overlap=True, got None: a ring "
                "sends shards of it"
            )
        return None
    if not -x.ndim <= dim < x.ndim or dim % x.ndim == x.ndim - 1:
        raise ValueError(
            f"{op} needs {option}= a dim of x before its features, got {dim} for shape {x.shape}"
        )
    return dim % x.ndim
