"""Groups of an axis, and other dtypes than float32."""

import jax
import jax.numpy as jnp
from audit_cases import P, on, shape, vary
from corpus.corpus_moves import (
    AXES,
    LINE,
    clean,
    exchanged,
    gathered,
    per_device,
    permuted,
    reduced,
    ring,
    scattered,
)
from jax import lax

import txcore as tx


@clean(reduced(64), axes=LINE)
def psum_in_index_groups(mesh):
    def body(x):
        return lax.psum(x, "data", axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]])

    return per_device(mesh, body, check_vma=False)


@clean(gathered(4 * 64), axes=LINE)
def all_gather_in_index_groups(mesh):
    def body(x):
        groups = [[0, 2, 4, 6], [1, 3, 5, 7]]
        return lax.all_gather(x, "data", axis_index_groups=groups, tiled=True).sum(0)[None]

    return per_device(mesh, body, check_vma=False)


@clean(reduced(32, "data", dtype="bfloat16"))
def bfloat16_sum(mesh):
    """Counted in the declared dtype, whatever the platform promotes it to."""
    return per_device(mesh, lambda x: vary(lax.psum(x, "data"), *AXES), jnp.bfloat16)


@clean(
    *[gathered(2 * 32, "data", dtype="bfloat16"), scattered(32, "model", dtype="bfloat16")],
    elsewhere={
        "tpu": (gathered(2 * 32, "data", dtype="bfloat16"), reduced(32, "model", dtype="bfloat16"))
    },
)
def bfloat16_gather_and_scatter(mesh):
    def body(x):
        whole = lax.all_gather(x, "data", tiled=True)
        return lax.psum_scatter(whole.sum(0)[None], "model", scatter_dimension=1, tiled=True)

    return per_device(mesh, body, jnp.bfloat16)


@clean(reduced(64, "data", dtype="int32"), reduced(16, "pipe", dtype="uint8"))
def integer_sums(mesh):
    def body(x, y):
        return vary(lax.psum(x, "data"), *AXES), vary(lax.pmax(y, "pipe"), *AXES)

    return per_device(mesh, body, jnp.int32, jnp.uint8)


@clean(reduced(64, "data", dtype="int32"), gathered(2 * 16, "model", dtype="bool"))
def booleans(mesh):
    """Counted as int32 when they are summed, and moved as they are."""

    def body(x):
        whole = lax.all_gather(x, "model", tiled=True)
        return tx.vary(tx.psum(x, "data"), AXES) + whole.all(0)[None]

    return per_device(mesh, body, jnp.bool_)


@clean(reduced(128, "data", dtype="complex64"), permuted(128, "pipe", dtype="complex64"))
def complex_numbers(mesh):
    def body(x):
        return lax.ppermute(jnp.sin(vary(lax.psum(x, "data"), *AXES)), "pipe", ring(2))

    return per_device(mesh, body, jnp.complex64)


@clean(exchanged(16, "data", dtype="int8"), permuted(16, "model", dtype="int8"))
def bytes_on_the_move(mesh):
    def body(x):
        x = lax.all_to_all(x, "data", 1, 0, tiled=True).reshape(1, 16)
        return lax.ppermute(x * jnp.int8(3), "model", ring(2))

    return per_device(mesh, body, jnp.int8)


@clean(exchanged(32, "data", dtype="bfloat16"), permuted(32, "model", dtype="bfloat16"))
def half_precision_on_the_move(mesh):
    def body(x):
        x = lax.all_to_all(x, "data", 1, 0, tiled=True).reshape(1, 16)
        return lax.ppermute(x * jnp.bfloat16(3), "model", ring(2))

    return per_device(mesh, body, jnp.bfloat16)


@clean(gathered(8 * 8, "data", dtype="uint32"), axes=LINE)
def random_keys(mesh):
    """A key is two words of 32 bits."""

    def body(words):
        keys = jax.random.wrap_key_data(words)
        return jax.random.key_data(lax.all_gather(keys, "data", tiled=True))[:1] * 2

    return on(mesh, P("data"), P("data"))(body), (shape(mesh, P("data"), 8, 2, dtype=jnp.uint32),)
