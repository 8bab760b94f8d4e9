"""Collectives under differentiation, and their transposes."""

import jax
import jax.numpy as jnp
from audit_cases import P, on, shape, tag, vary
from corpus.corpus_moves import (
    AXES,
    LINE,
    clean,
    exchanged,
    gathered,
    per_device,
    permuted,
    reduced,
    scattered,
)
from jax import lax

import txcore as tx

GATHER_AND_SCATTER = gathered(2 * 64, "data"), scattered(2 * 64, "data")


GATHER_AND_SUM = {"tpu": (gathered(2 * 64, "data"), reduced(2 * 64, "data"))}


@clean(*GATHER_AND_SCATTER, elsewhere=GATHER_AND_SUM)
def remat(mesh):
    """Declared twice, the gather of the weights is done once: its operand is the same."""

    def body(w):
        @jax.checkpoint
        def loss(w):
            with tag("all_gather/w"):
                whole = lax.all_gather(w, "data", tiled=True)
            return jnp.sin(jnp.sin(whole)).sum()

        return jax.grad(loss)(w)

    return per_device(mesh, body)


@clean(reduced(64, "data"), reduced(64, "data"))
def custom_vjp(mesh):
    @jax.custom_vjp
    def total(x):
        with tag("psum/forward"):
            return vary(lax.psum(x, "data"), *AXES)

    def backward(_, g):
        with tag("psum/backward"):
            return (vary(lax.psum(g, "data"), *AXES),)

    total.defvjp(lambda x: (total(x), None), backward)

    def body(x):
        value, grad = jax.value_and_grad(lambda x: jnp.sin(total(x)).sum())(x)
        return value + grad

    return per_device(mesh, body)


@clean(*GATHER_AND_SCATTER, elsewhere=GATHER_AND_SUM)
def gradient_through_all_gather(mesh):
    """The transpose, a reduce-scatter, carries the gather's tag."""

    def body(x):
        return jax.grad(lambda x: jnp.sin(tx.all_gather(x, "data")).sum())(x)

    return per_device(mesh, body)


@clean(*GATHER_AND_SCATTER, elsewhere=GATHER_AND_SUM, exact=False)
def gradient_through_a_plain_all_gather(mesh):
    def body(x):
        return jax.grad(lambda x: jnp.sin(lax.all_gather(x, "data", tiled=True)).sum())(x)

    return per_device(mesh, body)


@clean(
    *[scattered(64, "data"), gathered(64, "data")],
    elsewhere={"tpu": (reduced(64, "data"), reduced(64, "data"))},
)
def gradient_through_reduce_scatter(mesh):
    def body(x):
        return jax.grad(lambda x: jnp.sin(tx.reduce_scatter(x, "data", dim=1)).sum())(x)

    return per_device(mesh, body)


@clean(exchanged(64, "data"), exchanged(64, "data"))
def gradient_through_all_to_all(mesh):
    def body(x):
        def loss(x):
            return jnp.sin(tx.all_to_all(x, "data", split_dim=1, concat_dim=0)).sum()

        return jax.grad(loss)(x)

    return per_device(mesh, body)


@clean(permuted(64, "data"), permuted(64, "data"), axes=LINE)
def gradient_through_ppermute(mesh):
    """Backward the values go the other way around."""

    def body(x):
        return jax.grad(lambda x: jnp.sin(tx.shift(x, "data")).sum())(x)

    return per_device(mesh, body)


@clean(reduced(64, "data"))
def gradient_through_psum(mesh):
    """The transpose of an invariant sum sends nothing."""

    def body(x):
        return jax.grad(lambda x: jnp.sin(tx.psum(x, "data")).sum())(x)

    return per_device(mesh, body)


@clean(reduced(64, "data"), axes=LINE)
def gradient_through_vary(mesh):
    """The transpose of a cast to varying is a sum, with the cast's tag."""

    def body(w, x):
        return jax.grad(lambda w: (tx.vary(w, "data") * jnp.sin(x)).sum())(w)

    args = shape(mesh, P(), 16), shape(mesh, P("data"), 8, 16)
    return on(mesh, (P(), P("data")), P())(body), args


@clean(reduced(64, "data", trips=3), reduced(64, "data"), axes=LINE)
def accumulation_in_a_scan(mesh):
    def body(w, xs):
        def step(total, x):
            loss, grad = jax.value_and_grad(lambda w: jnp.sin(x * w).sum())(vary(w, "data"))
            return total + grad, tx.psum(loss * x, "data")

        grads, losses = lax.scan(step, vary(jnp.zeros(16), "data"), xs[0])
        return tx.pmean(grads, "data"), losses

    args = shape(mesh, P(), 16), shape(mesh, P("data"), 8, 3, 16)
    return on(mesh, (P(), P("data")), P())(body), args


@clean(reduced(64, "data"), reduced(64, "data"))
def forward_mode(mesh):
    """A jvp sends the value and its tangent."""

    def body(x):
        out, tangent = jax.jvp(lambda x: tx.vary(tx.psum(x, "data"), AXES), (x,), (jnp.sin(x),))
        return out * tangent

    return per_device(mesh, body)


@clean(
    *[scattered(64, "data"), gathered(2 * 32, "data"), reduced(64, "data")],
    elsewhere={"tpu": (reduced(64, "data"), reduced(64, "data"), reduced(64, "data"))},
    exact=False,
)
def gradients_without_varying_types(mesh):
    """With check_vma=False, where jax does not know what varies."""

    def body(x):
        def loss(x):
            part = lax.psum_scatter(x, "data", scatter_dimension=1, tiled=True)
            return (part * lax.stop_gradient(part)).sum()

        return jax.grad(loss)(x) * vary(lax.psum(x, "data"), *AXES)

    return per_device(mesh, body, check_vma=False)
