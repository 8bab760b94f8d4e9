"""Attention's heads over the devices of an axis."""


def check_heads(heads: int, kv_heads: int, devices: int) -> tuple[int, int]:
    """Return how many heads of queries, and of keys and values, each device has.

    Attention is split by its heads: the columns of the products that make queries, keys and values
    (`column_dense`), and the rows of the one after it (`row_dense`). Each device has the heads of
    queries that its own keys and values serve.

    Args:
      heads: of queries.
      kv_heads: of keys and values: as many, or fewer that serve `heads / kv_heads` each
        (grouped-query attention).
      devices: along the axis of tensor parallelism: a mesh's `shape["model"]`, or
        `tx.axis_size("model")` in a step.

    Returns:
      The two numbers.

    Raises:
      ValueError: the heads of keys do not divide those of queries, or the devices either.

    Example:
      >>> tx.tensor.check_heads(16, 4, devices=2)
      (8, 2)

    References:
      Shoeybi et al., Megatron-LM, 2019, section 3; Ainslie et al., "GQA", 2023.
    """
    given = f"got heads={heads}, kv_heads={kv_heads} over {devices} devices"
    if min(heads, kv_heads, devices) < 1:
        raise ValueError(f"tensor.check_heads needs counts from 1 on, {given}")
    if heads % kv_heads:
        raise ValueError(
            f"tensor.check_heads needs heads of keys that divide those of queries, {given}: take "
            f"kv_heads={max(n for n in range(1, kv_heads + 1) if heads % n == 0)}"
        )
    if kv_heads % devices:
        what = "heads" if heads == kv_heads else "heads of keys and values"
        most = max(n for n in range(1, devices + 1) if kv_heads % n == 0)
        raise ValueError(
            f"tensor.check_heads needs {what} that the devices of tensor parallelism divide, "
            f"{given}: use {most} of them along that axis, or "
            f"{-(-kv_heads // devices) * devices} {what}"
        )
    return heads // devices, kv_heads // devices
