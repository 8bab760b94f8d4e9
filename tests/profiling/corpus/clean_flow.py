"""Collectives in loops and branches."""

import jax.numpy as jnp
from audit_cases import P, on, shape, vary
from corpus.corpus_moves import (
    AXES,
    clean,
    gathered,
    per_device,
    permuted,
    reduced,
    ring,
    rows,
    scattered,
)
from jax import lax


@clean(reduced(64, "data", trips=7))
def scan(mesh):
    def body(x):
        def step(carry, _):
            return vary(lax.psum(carry, "data"), *AXES) * 0.5, None

        return lax.scan(step, x, None, length=7)[0]

    return per_device(mesh, body)


@clean(reduced(64, "data", trips=5 * 3), permuted(64, "pipe", trips=5))
def nested_scan(mesh):
    def body(x):
        def inner(carry, _):
            return vary(lax.psum(carry, "data"), *AXES) * 0.5, None

        def outer(carry, _):
            carry = lax.ppermute(jnp.sin(carry), "pipe", ring(2))
            return lax.scan(inner, carry, None, length=3)[0], None

        return lax.scan(outer, x, None, length=5)[0]

    return per_device(mesh, body)


@clean(
    *[gathered(2 * 64, "model", trips=4), scattered(2 * 64, "model", trips=4)],
    elsewhere={"tpu": (reduced(2 * 64, "model", trips=4), reduced(2 * 64, "model", trips=4))},
)
def scan_that_unrolls_by_two(mesh):
    def body(x):
        def step(carry, _):
            whole = jnp.sin(lax.all_gather(carry, "model", axis=1, tiled=True))
            part = lax.psum_scatter(whole, "model", scatter_dimension=1, tiled=True)
            return part * 0.5, None

        return lax.scan(step, x, None, length=4, unroll=2)[0]

    return per_device(mesh, body)


@clean(permuted(64, "data"), reduced(4, *AXES))
def while_loop(mesh):
    """Nobody knows how often it runs: counted once, in the body and in the condition."""

    def body(x):
        def is_large(x):
            return lax.psum(jnp.sum(x * x), AXES) > 1.0

        return lax.while_loop(is_large, lambda x: lax.ppermute(x * 0.5, "data", ring(2)), x)

    return per_device(mesh, body)


@clean(reduced(64, "data"), reduced(64, "data"))
def both_branches_of_cond(mesh):
    def body(x, p):
        def small(x):
            return lax.psum(jnp.sin(x), "data")

        def large(x):
            return lax.psum(jnp.cos(x), "data")

        return vary(lax.cond(p[0] > 0, small, large, x), *AXES)

    args = rows(mesh), shape(mesh, P(), 1)
    return on(mesh, (P(AXES), P()), P(AXES))(body), args


@clean(reduced(64, "data"), gathered(2 * 64, "pipe"))
def switch_with_an_empty_branch(mesh):
    def body(x, i):
        branches = (
            lambda x: vary(lax.psum(x, "data"), *AXES),
            lambda x: lax.all_gather(x, "pipe", tiled=True)[1:] * 2,
            lambda x: x * 3,
        )
        return lax.switch(i[0], branches, x)

    args = rows(mesh), shape(mesh, P(), 1, dtype=jnp.int32)
    return on(mesh, (P(AXES), P()), P(AXES))(body), args


@clean(reduced(64, "data", trips=6))
def fori_loop(mesh):
    def body(x):
        return lax.fori_loop(0, 6, lambda i, x: vary(lax.psum(jnp.sin(x), "data"), *AXES) * i, x)

    return per_device(mesh, body)
