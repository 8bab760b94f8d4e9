"""Beside a real collective of the same tag, kind, groups and size."""

import jax.numpy as jnp
from audit_cases import P, on, shape, tag
from corpus.corpus_claims import LINE, lie, psum_of
from jax import lax


@lie(axes=LINE)
def sum_under_the_tag_of_a_real_one(mesh):
    def fn(x):
        real = psum_of(mesh, "psum/x")(x)[0]
        with tag("psum/x"):
            return jnp.sin(real + 1) + jnp.sum(x * jnp.sin(real), 0)  # <-- here

    return fn, (shape(mesh, P("data"), 8, 16),)


@lie(axes=LINE)
def merged_with_a_real_one(mesh):
    """The combiner makes one op of the user's psum and the partitioner's sum."""

    def fn(x):
        return psum_of(mesh, "psum/x")(x), (x * 3).sum(0)  # <-- here

    return fn, (shape(mesh, P("data"), 8, 16),)


@lie(axes=LINE)
def merged_with_a_real_one_under_its_tag(mesh):
    def fn(x):
        with tag("psum/x"):
            return psum_of(mesh, "psum/x")(x), (x * 3).sum(0)  # <-- here

    return fn, (shape(mesh, P("data"), 8, 16),)


@lie(axes=LINE)
def added_to_a_real_one(mesh):
    """On TPU and GPU one op is left: both are summed on each device, then by the user's psum."""

    def fn(x):
        real = psum_of(mesh, "psum/x")(x)[0]
        return real + (x * 3).sum(0)  # <-- here

    return fn, (shape(mesh, P("data"), 8, 16),)


@lie(axes=LINE)
def merged_with_plain_jax(mesh):
    def fn(x):
        real = on(mesh, P("data"), P())(lambda v: lax.psum(v, "data"))(x)
        return real, jnp.sin(x).sum(0)  # <-- here

    return fn, (shape(mesh, P("data"), 8, 16),)
