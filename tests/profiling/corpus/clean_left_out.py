"""What compilers leave out or do once."""

import jax.numpy as jnp
from audit_cases import P, on, shape, tag, vary
from corpus.corpus_moves import AXES, clean, per_device, reduced
from jax import lax

import txcore as tx


@clean(reduced(64, "data"))
def dead_collective(mesh):
    def body(x):
        tx.psum(x[0, :3], "data")
        return tx.vary(tx.psum(x, "data"), AXES)

    return per_device(mesh, body)


@clean(reduced(64, "data"))
def duplicated_collective(mesh):
    def body(x):
        with tag("psum/a"):
            a = lax.psum(x, "data")
        with tag("psum/b"):
            return vary(a + lax.psum(x, "data"), *AXES)

    return per_device(mesh, body)


@clean(reduced(64, "data"), axes={"data": 8, "one": 1})
def txcore_over_an_axis_of_size_one(mesh):
    """Nothing varies along the axis of one device, so txcore leaves it out."""

    def body(x):
        x = tx.pmean(tx.psum(x, "data"), "one")
        return tx.vary(tx.all_gather(x, "one"), "data")

    return on(mesh, P("data"), P("data"))(body), (shape(mesh, P("data"), 8, 16),)


@clean(
    *[reduced(64, "data"), reduced(64)],
    elsewhere={"tpu": (reduced(64, "data"),), "cuda": (reduced(64, "data"),)},
    axes={"data": 8, "one": 1},
)
def plain_jax_over_an_axis_of_size_one(mesh):
    """The compiler of CPU keeps it, in groups of one device."""
    return per_device(mesh, lambda x: vary(lax.psum(lax.psum(x, "data"), "one"), "data", "one"))


@clean(reduced(64, "data"), reduced(4, "data"))
def sum_of_a_constant(mesh):
    def body(x):
        count = lax.psum(vary(jnp.float32(1), *AXES), "data")
        return vary(lax.psum(x, "data") / count, *AXES)

    return per_device(mesh, body)


@clean()
def nothing_is_sent(mesh):
    """Sizes, indices and sums of Python numbers are known on each device."""

    def body(x):
        return x * lax.psum(1, "data") + lax.axis_index("model") * lax.axis_size("pipe")

    return per_device(mesh, body)
