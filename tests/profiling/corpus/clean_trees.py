"""Pytrees and buckets: what compilers combine."""

import jax
import jax.numpy as jnp
from audit_cases import P, on, shape, tag, vary
from corpus.corpus_moves import AXES, LINE, clean, gathered, per_device, reduced, rows
from jax import lax

import txcore as tx


@clean(reduced(64, *AXES), reduced(8, *AXES), reduced(4, *AXES))
def tree_of_three(mesh):
    """Three psums, which the compiler combines into one op."""

    def body(x):
        return tx.psum({"w": x, "b": x[0, :2], "loss": x.sum()}, AXES)

    return on(mesh, P(AXES), P())(body), (rows(mesh),)


@clean(reduced(64, "data", dtype="float32"), reduced(32, "data", dtype="bfloat16"))
def tree_of_two_dtypes(mesh):
    """The compiler widens the bfloat16 and sends both as one: still counted as declared."""

    def body(x, y):
        x, y = lax.psum((x, y), "data")
        return vary(x, *AXES), vary(y, *AXES)

    return per_device(mesh, body, jnp.float32, jnp.bfloat16)


@clean(reduced(64, "data"), reduced(64, "data"), reduced(64, "model"))
def two_merged_and_one_of_another_axis(mesh):
    def body(x):
        with tag("psum/a"):
            a = lax.psum(x, "data")
        with tag("psum/b"):
            b = lax.psum(jnp.sin(x), "data")
        with tag("psum/c"):
            c = lax.psum(jnp.cos(x), "model")
        return vary(a, *AXES) * vary(b, *AXES) * vary(c, *AXES)

    return per_device(mesh, body)


@clean(
    *[reduced(64, "data"), reduced(64, "data")],
    elsewhere={"tpu": (reduced(64, "data"),), "cuda": (reduced(64, "data"),)},
)
def sum_of_two_sums(mesh):
    """Two psums whose results are added are one psum of the sum, where the compiler sees it."""

    def body(x):
        return tx.vary(tx.psum(x, "data") + tx.psum(jnp.sin(x), "data"), AXES)

    return per_device(mesh, body)


@clean(gathered(2 * 64, "data"), gathered(2 * 64, "data"))
def two_gathers(mesh):
    def body(x):
        a = lax.all_gather(x, "data", tiled=True)
        b = lax.all_gather(jnp.sin(x), "data", tiled=True)
        return a.sum(0)[None], b.max(0)[None]

    return per_device(mesh, body)


@clean(
    *[gathered(2 * 64, "data"), gathered(2 * 64, "data")],
    elsewhere={"cuda": (gathered(2 * 64, "data"),)},
)
def product_of_two_gathers(mesh):
    """XLA for GPU multiplies first and gathers the product."""

    def body(x):
        a = lax.all_gather(x, "data", tiled=True)
        b = lax.all_gather(jnp.sin(x), "data", tiled=True)
        return (a * b).sum(0)[None]

    return per_device(mesh, body)


@clean(reduced((16 + 4 + 1) * 4, "data"), axes=LINE)
def gradient_bucket_by_hand(mesh):
    def body(w, b, x):
        def loss(w, b):
            return jnp.sin(x @ w + b).sum()

        value, (dw, db) = jax.value_and_grad(loss, argnums=(0, 1))(vary(w, "data"), vary(b, "data"))
        flat = jnp.concatenate([dw.reshape(-1), db, value[None]])
        with tag("psum/bucket"):
            flat = lax.psum(flat, "data")
        return flat[:16].reshape(4, 4), flat[16:20], flat[20]

    args = shape(mesh, P(), 4, 4), shape(mesh, P(), 4), shape(mesh, P("data"), 8, 4)
    return on(mesh, (P(), P(), P("data")), P())(body), args


@clean(*[reduced(64 * (i + 1), "data") for i in range(12)], axes=LINE)
def tree_of_twelve_shapes(mesh):
    def body(x):
        tree = {f"layer{i}": jnp.sin(jnp.tile(x, (i + 1, 1)) * (i + 1)) for i in range(12)}
        return tx.psum(tree, "data")

    return on(mesh, P("data"), P())(body), (shape(mesh, P("data"), 8, 16),)
