"""In the place of a collective that the compiler left out, merged, halved or moved."""

import jax.numpy as jnp
from audit_cases import P, on, shape, tag
from corpus.corpus_claims import LINE, lie, psum_of
from jax import lax


@lie(axes=LINE)
def in_the_place_of_a_dead_one(mesh):
    def fn(x):
        psum_of(mesh, "psum/x")(jnp.cos(x))
        with tag("psum/x"):
            return jnp.sin(x).sum(0)  # <-- here

    return fn, (shape(mesh, P("data"), 8, 16),)


@lie(axes=LINE)
def in_the_place_of_a_dead_one_inside(mesh):
    """The dead psum is in a shard_map that is alive."""

    def fn(x):
        def body(v):
            with tag("psum/x"):
                lax.psum(jnp.cos(v), "data")
            return v * 2

        y = on(mesh, P("data"), P("data"))(body)(x)
        with tag("psum/x"):
            return jnp.sin(y).sum(0)  # <-- here

    return fn, (shape(mesh, P("data"), 8, 16),)


@lie(axes=LINE)
def in_the_place_of_a_deduplicated_one(mesh):
    """Two psums of one operand become one op, and the partitioner adds one like it."""

    def fn(x):
        def body(v):
            with tag("psum/a"):
                a = lax.psum(v, "data")
            with tag("psum/b"):
                return a + lax.psum(v, "data")

        real = on(mesh, P("data"), P())(body)(x)[0]
        with tag("psum/b"):
            return jnp.sin(real) + jnp.sum(x * jnp.cos(real), 0)  # <-- here

    return fn, (shape(mesh, P("data"), 8, 16),)


@lie(axes=LINE)
def in_the_place_of_a_sum_of_constants(mesh):
    """A product with zero is a constant to the compiler, which then sums nothing."""

    def fn(x):
        def body(v):
            with tag("psum/x"):
                return v * 2 + lax.psum(v - v, "data")[:1] * 0

        y = on(mesh, P("data"), P("data"), check_vma=False)(body)(x.astype(jnp.int32))
        with tag("psum/x"):
            return (y * 3).sum(0)  # <-- here

    return fn, (shape(mesh, P("data"), 8, 16),)


@lie(axes=LINE)
def boundary_in_the_place_of_a_dead_gather(mesh):
    """The reshard at the edge has the kind, groups and bytes of the gather that nothing uses."""

    def fn(x):
        def dead(v):
            with tag("all_gather/x"):
                lax.all_gather(v, "data", tiled=True)
            return v * 2

        y = on(mesh, P("data"), P("data"))(dead)(x)
        return on(mesh, P(), P())(jnp.sin)(y)  # <-- here

    return fn, (shape(mesh, P("data"), 8, 16),)


@lie(axes=LINE)
def one_each_trip_while_the_users_own_is_hoisted(mesh):
    """The user's operand is the same in each trip: the compiler sums it once, before the loop."""

    def fn(x, w):
        def step(carry, _):
            real = psum_of(mesh, "psum/x")(w)[0]
            with tag("psum/x"):
                return carry * 0.5 + jnp.sin(carry + x).sum(0) + real, None  # <-- here

        return lax.scan(step, jnp.zeros(16), None, length=5)[0]

    return fn, (shape(mesh, P("data"), 8, 16), shape(mesh, P("data"), 8, 16))


@lie(axes=LINE)
def in_a_loop_of_unknown_length(mesh):
    """Where trips are unknown, bytes per call cannot tell one op in the loop from two."""

    def fn(x, n):
        def step(state):
            i, carry = state
            real = psum_of(mesh, "psum/x")(x * carry)[0]
            with tag("psum/x"):
                return i + 1, jnp.sin(real) + jnp.cos(x + real).sum(0)  # <-- here

        return lax.while_loop(lambda s: s[0] < n[0], step, (0, jnp.zeros(16)))[1]

    return fn, (shape(mesh, P("data"), 8, 16), shape(mesh, P(), 1, dtype=jnp.int32))


@lie(axes=LINE)
def in_the_other_branch(mesh):
    def fn(x, p):
        def declared(x):
            return psum_of(mesh, "psum/x")(x)[0]

        def added(x):
            with tag("psum/x"):
                return jnp.sin(x).sum(0)  # <-- here

        return lax.cond(p[0] > 0, declared, added, x)

    return fn, (shape(mesh, P("data"), 8, 16), shape(mesh, P(), 1))


@lie(axes=LINE)
def wide_real_one_and_two_narrow_others(mesh):
    """Bytes in all add up to what is declared: one dead psum of 32 numbers, two sums of 16."""

    def fn(x, y):
        def body(v):
            with tag("psum/x"):
                lax.psum(jnp.concatenate([v, v * v], 1), "data")
            return v * 2

        z = on(mesh, P("data"), P("data"))(body)(x)
        with tag("psum/x"):
            return jnp.sin(z).sum(0), jnp.cos(y).sum(0)  # <-- here

    return fn, (shape(mesh, P("data"), 8, 16), shape(mesh, P("data"), 8, 16))


@lie()
def in_the_place_of_a_deduplicated_gather(mesh):
    """Two equal gathers along model become one; the partitioner gathers along model under a tag."""

    def fn(x, y):
        def twice(v):
            with tag("all_gather/x"):
                a = lax.all_gather(v, "model", tiled=True)
            with tag("all_gather/x"):
                return a + lax.all_gather(v, "model", tiled=True)

        def gather(v):
            with tag("all_gather/x"):
                return lax.all_gather(v, "data", tiled=True)  # <-- here

        real = on(mesh, P(("data", "model")), P(("data", "model")))(twice)(y)
        return real, on(mesh, P("data"), P("data"), axis_names={"data"})(gather)(x)  # <-- here

    return fn, (shape(mesh, P("data", "model"), 8, 8), shape(mesh, P(("data", "model")), 64))


@lie()
def other_half_of_a_halved_one(mesh):
    """Of 64 numbers that are declared the partitioner has the user send 32, and adds 32 itself."""

    def fn(x, y):
        def body(v):
            with tag("psum/x"):
                return lax.psum(v, "data")

        half = on(mesh, P("data"), P(), axis_names={"data"})(body)(x)
        with tag("psum/x"):
            return half, jnp.sin(y).sum(0)  # <-- here

    return fn, (shape(mesh, P("data", "model"), 16, 16), shape(mesh, P("data"), 4, 32))


@lie(axes=LINE)
def trips_that_add_up(mesh):
    """Of five trips that are declared one is left, before the loop; four more are in another."""

    def fn(x, w):
        def step(carry, _):
            return carry * 0.5 + psum_of(mesh, "psum/x")(w)[0], None

        def added(carry, _):
            with tag("psum/x"):
                return carry * 0.5 + jnp.sin(carry + x).sum(0), None  # <-- here

        first, _ = lax.scan(step, jnp.zeros(16), None, length=5)
        return lax.scan(added, first, None, length=4)[0]

    return fn, (shape(mesh, P("data"), 8, 16), shape(mesh, P("data"), 8, 16))


@lie(axes=LINE)
def in_the_place_of_an_added_one(mesh):
    """TPU and GPU sum two psums that are added as one, and the partitioner's is another."""

    def fn(x):
        def body(v):
            with tag("psum/x"):
                return lax.psum(v, "data") + lax.psum(jnp.sin(v), "data")

        real = on(mesh, P("data"), P())(body)(x)[0]
        with tag("psum/x"):
            return jnp.sin(real) * jnp.sum(x * jnp.cos(real), 0)  # <-- here

    return fn, (shape(mesh, P("data"), 8, 16),)


@lie(axes=LINE)
def gather_as_a_sum_in_the_place_of_a_deduplicated_one(mesh):
    """XLA for TPU gathers little by a sum, and that has neither mark nor name."""

    def fn(x, y):
        def twice(v):
            return lax.psum(v, "data") * lax.psum(v, "data")

        return on(mesh, P("data"), P())(twice)(x), jnp.sort(y * 2)  # <-- here

    return fn, (shape(mesh, P("data"), 8, 64), shape(mesh, P("data"), 64))
