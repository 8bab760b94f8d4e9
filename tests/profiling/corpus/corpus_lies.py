"""Programs in which the tag lies: what the partitioner added looks as if the user had asked.

Each holds at least one collective that nobody wrote, dressed as one that somebody did: under the
user's tag, under the name of a collective, merged with the user's or standing in for one that the
compiler left out. None may pass.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from audit_cases import P, on, shape, tag, vary
from corpus.corpus_programs import Program
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding

LIES: dict[str, Program] = {}
GRID = {"data": 4, "model": 2}
LINE = {"data": 8}


def lie(*, axes: Mapping[str, int] = GRID, **more: Any):
    def register(build):
        LIES[build.__name__] = Program(build, axes, **more)
        return build

    return register


def psum_of(mesh, text):
    """Return a function that sums the rows of its argument over the axis data, under a tag."""

    def body(v):
        with tag(text):
            return lax.psum(v, "data")

    return on(mesh, P("data"), P())(body)


# --- the partitioner's op carries the user's tag ---


@lie()
def partial_auto_gather(mesh):
    """The partitioner gathers along model, at the shard_map's edge or before the user's gather."""

    def fn(x):
        def body(x):
            with tag("all_gather/x"):
                return lax.all_gather(x, "data", tiled=True)  # <-- here

        return on(mesh, P("data"), P("data"), axis_names={"data"})(body)(x)  # <-- here

    return fn, (shape(mesh, P("data", "model"), 8, 8),)


@lie()
def partial_auto_matmul(mesh):
    """Under one tag the partitioner sums over model, then the user over data."""

    def body(x, w):
        with tag("psum/x"):
            return lax.psum(x @ w, "data")  # <-- here

    fn = on(mesh, (P("data"), P()), P(), axis_names={"data"})(body)
    return fn, (shape(mesh, P("data", "model"), 8, 8), shape(mesh, P("model"), 8, 8))


@lie()
def matmul_under_a_tag(mesh):
    def fn(x, w):
        with tag("psum/x"):
            return x @ w  # <-- here

    return fn, (shape(mesh, P(None, "data"), 8, 8), shape(mesh, P("data"), 8, 8))


@lie()
def sharding_constraint_under_a_tag(mesh):
    def fn(x):
        with tag("all_gather/x"):
            y = lax.with_sharding_constraint(x * 2, NamedSharding(mesh, P()))  # <-- here
            return jnp.sin(y)

    return fn, (shape(mesh, P("data"), 8, 8),)


@lie()
def jitted_function_under_a_tag(mesh):
    @jax.jit
    def mean(x):
        return x.mean(0)  # <-- here

    def fn(x):
        with tag("psum/mean"):
            return mean(x)

    return fn, (shape(mesh, P("data"), 8, 8),)


@lie()
def mean_under_a_tag_outside_any_shard_map(mesh):
    def fn(x):
        with tag("pmean/loss"):
            return jnp.sin(x).mean()  # <-- here

    return fn, (shape(mesh, P(("data", "model")), 8, 8),)


@lie()
def boundary_under_a_tag(mesh):
    def fn(x):
        with tag("all_gather/x"):
            return on(mesh, P(), P())(lambda x: x * 2)(jnp.sin(x))  # <-- here

    return fn, (shape(mesh, P("data"), 8, 8),)


@lie()
def gradient_under_a_tag(mesh):
    def fn(w, x):
        def loss(w):
            with tag("psum/grads"):
                return jnp.sin(x @ w).sum()  # <-- here

        return jax.grad(loss)(w)

    return fn, (shape(mesh, P(), 4, 4), shape(mesh, P("data"), 8, 4))


# --- beside a real collective of the same tag, kind, groups and size ---


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


# --- in the place of a collective that the compiler left out ---


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


# --- under the name of a collective ---


@lie()
def function_called_psum(mesh):
    @jax.jit
    def psum(x):
        return x.sum(0)  # <-- here

    return psum, (shape(mesh, P("data"), 8, 8),)


@lie()
def function_called_all_gather(mesh):
    @jax.jit
    def all_gather(x):
        return lax.with_sharding_constraint(jnp.sin(x), NamedSharding(mesh, P())) * 2  # <-- here

    return lambda x: all_gather(x), (shape(mesh, P("data"), 8, 8),)


@lie()
def function_called_reshard(mesh):
    @jax.jit
    def reshard(x):
        return on(mesh, P(), P())(jnp.cos)(jnp.sin(x))  # <-- here

    return reshard, (shape(mesh, P("data"), 8, 8),)


@lie()
def scope_called_psum(mesh):
    def fn(x):
        with jax.named_scope("psum"):
            return jnp.sin(x).sum(0)  # <-- here

    return fn, (shape(mesh, P("data"), 8, 8),)


@lie()
def argument_called_psum(mesh):
    def fn(psum):
        return on(mesh, P(), P())(jnp.cos)(psum)  # <-- here

    return fn, (shape(mesh, P("data"), 8, 8),)


@lie()
def argument_that_looks_like_a_path(mesh):
    """Since jax 0.11 a reshard of an argument has the argument's name as its op_name."""

    def fn(params):
        return on(mesh, P(), P())(jnp.cos)(params["jit(f)/shard_map/reshard"])  # <-- here

    return fn, ({"jit(f)/shard_map/reshard": shape(mesh, P("data"), 8, 8)},)


@lie()
def reshard_beside_an_explicit_one(mesh):
    """One reshard is asked for by name; the other, of the same size, is not."""
    explicit = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,) * 2)

    def fn(x):
        asked = jax.sharding.reshard(jnp.sin(x), NamedSharding(explicit, P()))

        @jax.sharding.auto_axes(out_sharding=NamedSharding(explicit, P("data")))
        def left_to_the_partitioner(x):
            return jnp.sort(x * 2)  # <-- here

        return asked, left_to_the_partitioner(x)

    return fn, (shape(explicit, P("data"), 64),)


@lie(axes=LINE)
def plain_psum_of_vmap_names(mesh):
    """A psum over vmap's axis sends nothing; the partitioner's sum of its sharded dim does."""

    def fn(x):
        def row(v):
            return v - lax.psum(v, "data")  # <-- here

        return jax.vmap(row, axis_name="data")(jnp.sin(x))

    return fn, (shape(mesh, P("data"), 8, 16),)


@lie(axes=LINE)
def psum_of_vmap_names_under_its_tag(mesh):
    def fn(x):
        def row(v):
            with tag("psum/x"):
                return v - vary(lax.psum(v, "data"))  # <-- here

        return jax.vmap(row, axis_name="data")(jnp.sin(x))

    return fn, (shape(mesh, P("data"), 8, 16),)
