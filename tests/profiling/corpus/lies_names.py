"""Under the name of a collective, or beside a reshard that was asked for."""

import jax
import jax.numpy as jnp
from audit_cases import P, on, shape, tag, vary
from corpus.corpus_claims import LINE, lie
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding


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
