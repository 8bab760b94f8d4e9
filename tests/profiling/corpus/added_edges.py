"""Reshards at the edges of jit and shard_map, by constraint, and by name."""

import jax
import jax.numpy as jnp
from audit_cases import P, on, shape
from corpus.corpus_marks import UNNAMED, added
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding


@added()
def sharding_constraint(mesh):
    def fn(x):
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P())) * 2  # <-- here

    return fn, (shape(mesh, P("data"), 8),)


@added()
def sharding_constraint_inside(mesh):
    def fn(x):
        y = lax.with_sharding_constraint(jnp.sin(x), NamedSharding(mesh, P()))  # <-- here
        return jnp.cumsum(y)

    return fn, (shape(mesh, P("data"), 8),)


@added("boundary", limits=UNNAMED)
def out_shardings(mesh):
    def fn(x):
        return x * 2  # <-- here

    return jax.jit(fn, out_shardings=NamedSharding(mesh, P())), (shape(mesh, P("data"), 8),)


@added("boundary")
def shard_map_argument(mesh):
    def fn(x):
        return on(mesh, P(), P())(lambda x: x * 2)(x)  # <-- here

    return fn, (shape(mesh, P("data"), 8, 8),)


@added()
def shard_map_operand(mesh):
    """What the shard_map wants spreads back: the operand of the sine is gathered."""

    def fn(x):
        return on(mesh, P(), P())(lambda x: x * 2)(jnp.sin(x))  # <-- here

    return fn, (shape(mesh, P("data"), 8, 8),)


@added()
def shard_map_transposed(mesh):
    """Sharded along one dim outside, along the other inside: an all-to-all before the sine."""

    def fn(x):
        return on(mesh, P(None, "data"), P(None, "data"))(jnp.cos)(jnp.sin(x))  # <-- here

    return fn, (shape(mesh, P("data"), 8, 8),)


@added("boundary")
def between_two_shard_maps(mesh):
    def fn(x):
        y = on(mesh, P("data"), P("data"))(jnp.sin)(x)
        return on(mesh, P("model"), P("model"))(jnp.cos)(y)  # <-- here

    return fn, (shape(mesh, P("data"), 8, 8),)


@added()
def sum_of_two_shardings(mesh):
    def fn(x, y):
        return jnp.sin(x) + jnp.cos(y)  # <-- here

    return fn, (shape(mesh, P("data"), 8, 8), shape(mesh, P(None, "data"), 8, 8))


@added(eager=True)
def eager_sum_of_two_shardings(mesh):
    def fn(x, y):
        return x + y  # <-- here

    return fn, (shape(mesh, P("data"), 8, 8), shape(mesh, P(None, "data"), 8, 8))


@added(platforms=("cpu", "tpu"))
def callback_of_a_sharded_array(mesh):
    def fn(x):
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda x: x, out, jnp.sin(x)) * 2  # <-- here

    return fn, (shape(mesh, P("data"), 64),)


@added("reshard", eager=True, only_when_run=True)
def device_put(mesh):
    def fn(x):
        return jax.device_put(x, NamedSharding(mesh, P()))  # <-- here

    return fn, (shape(mesh, P("data"), 8, 8),)


@added("reshard")
def explicit_reshard(mesh):
    explicit = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,) * 2)

    def fn(x):
        whole = NamedSharding(explicit, P())
        return jax.sharding.reshard(jnp.sin(x), whole)  # <-- here

    return fn, (shape(explicit, P("data"), 8, 8),)


@added("reshard")
def explicit_reshard_of_an_argument(mesh):
    explicit = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,) * 2)

    def fn(x):
        return jax.sharding.reshard(x, NamedSharding(explicit, P("data")))  # <-- here

    return fn, (shape(explicit, P(None, "data"), 8, 8),)


@added("autodiff")
def autodiffs_own_psum(mesh):
    def fn(w, x):
        def step(w, x):
            return jax.grad(lambda w: jnp.sin(x @ w).sum())(w)  # <-- here

        return on(mesh, (P(), P("data")), P())(step)(w, x)

    return fn, (shape(mesh, P(), 4, 4), shape(mesh, P("data"), 8, 4))


@added("autodiff")
def autodiffs_own_psum_in_a_scan(mesh):
    def fn(w, x):
        def loss(w, x):
            def step(carry, _):
                return jnp.sin(carry @ w), None  # <-- here

            return lax.scan(step, x, None, length=3)[0].sum()

        return on(mesh, (P(), P("data")), P())(jax.grad(loss))(w, x)

    return fn, (shape(mesh, P(), 4, 4), shape(mesh, P("data"), 8, 4))
