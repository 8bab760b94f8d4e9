"""How to compile a program that uses these kernels."""


def compiler_options(platform: str) -> dict[str, str]:
    """Return the compiler options with which these kernels run fastest on a platform.

    On CPU they turn off XLA's YNN fusions, with which the filter gradient of a convolution takes
    up to four times as long (jax 0.10.2; less on later versions). The cost: the gradient of
    `lax.reduce_window`, which `conv2d` does not use, can be a tenth slower on jax 0.11 and 0.12.

    On GPU they let two collectives be under way at a time, in place of one: of the two directions
    of a ring (`tx.tensor.column_dense(overlap=True)`) one would be waited for.

    The options belong to one compiled function; no environment variable is changed.

    Args:
      platform: a jax platform name, such as "cpu", "cuda" or "tpu".

    Returns:
      Options for `jax.jit(f, compiler_options=...)` or `lowered.compile(...)`; empty where none
      are known to help.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from txcore import kernels
      >>> options = kernels.compiler_options(jax.default_backend())
      >>> float(jax.jit(jnp.sin, compiler_options=options)(0.0))
      0.0
    """
    if platform in ("gpu", "cuda"):
        return {"xla_gpu_experimental_parallel_collective_overlap_limit": "2"}
    return {"xla_cpu_experimental_ynn_fusion_type": ""} if platform == "cpu" else {}
