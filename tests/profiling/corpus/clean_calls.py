"""Collectives beside and inside of calls: jit, shard_map, vmap, kernels, callbacks."""

import jax
import jax.numpy as jnp
from audit_cases import P, on, shape, vary
from corpus.corpus_moves import (
    AXES,
    GRID,
    LINE,
    clean,
    gathered,
    per_device,
    permuted,
    reduced,
    ring,
    rows,
)
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh


@clean(reduced(64, "data"), reduced(64, "data"))
def jit_inside_shard_map(mesh):
    @jax.jit
    def total(x):
        return vary(lax.psum(jnp.sin(x), "data"), *AXES)

    return per_device(mesh, lambda x: total(total(x)))


@clean(reduced(64, "data"), gathered(2 * 64, "model"))
def nested_shard_map(mesh):
    def inner(x):
        return lax.all_gather(x, "model", tiled=True)[:1] * 2

    def body(x):
        x = vary(lax.psum(x, "data"), "data")
        manual = P(("model", "pipe"))
        return jax.shard_map(inner, in_specs=manual, out_specs=manual)(x)

    spec = P("data")
    fn = on(mesh, spec, spec, axis_names={"data"})(body)
    return fn, (shape(mesh, P(AXES), 8, 16),)


@clean(reduced(64, "data"), reduced(64, "model"), permuted(64, "pipe"))
def three_shard_maps(mesh):
    def fn(x):
        spec = P(AXES)
        x = on(mesh, spec, spec)(lambda x: vary(lax.psum(x, "data"), *AXES))(x)
        x = on(mesh, spec, spec)(lambda x: vary(lax.psum(x, "model"), *AXES))(jnp.sin(x))
        return on(mesh, spec, spec)(lambda x: lax.ppermute(x, "pipe", ring(2)))(jnp.cos(x))

    return fn, (rows(mesh),)


@clean(reduced(64, "data"), gathered(2 * 64, "model"))
def vmap_inside_shard_map(mesh):
    def one(x):
        total = vary(lax.psum(x, "data"), *AXES)
        return total + lax.all_gather(x, "model").sum(0)

    return per_device(mesh, lambda x: jax.vmap(one)(x.reshape(16)[:, None]).reshape(1, 16))


@clean()
def vmap_with_an_axis_name(mesh):
    """The axis is the array's own: nothing is sent."""
    over_rows = jax.vmap(lambda x: x / lax.psum(x, "batch"), axis_name="batch")
    return per_device(mesh, over_rows, check_vma=False)


@clean(reduced(64, "data"))
def pallas_kernel(mesh):
    def double(x_ref, o_ref):
        o_ref[...] = x_ref[...] * 2.0

    def body(x):
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        doubled = pl.pallas_call(double, out_shape=out, interpret=True)(x)
        return lax.psum(doubled, "data")

    return per_device(mesh, body, check_vma=False)


@clean(reduced(64, "data"))
def ffi_call(mesh):
    """On CPU a Cholesky factorization is a call of LAPACK."""

    def body(x):
        a = jnp.outer(x[0, :4], x[0, :4]) + jnp.eye(4)
        return vary(lax.psum(jnp.linalg.cholesky(a).reshape(1, 16), "data"), *AXES)

    return per_device(mesh, body)


@clean(reduced(64, "data"), platforms=("cpu", "tpu"))
def pure_callback(mesh):
    """jax lowers callbacks for a GPU only where there is one."""

    def body(x):
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return lax.psum(jax.pure_callback(lambda x: x, out, x), "data")

    return per_device(mesh, body, check_vma=False)


@clean(reduced(64, "data"))
def donated_argument(mesh):
    fn, args = per_device(mesh, lambda x: vary(lax.psum(x, "data"), *AXES))
    return jax.jit(fn, donate_argnums=0), args


@clean(reduced(64, "data"))
def unchecked_types(mesh):
    return per_device(mesh, lambda x: lax.psum(x, "data"), check_vma=False)


@clean(reduced(64, "data"), permuted(64, "x"), axes=LINE)
def two_meshes(mesh):
    """The same devices under other names: each collective has the axes of its own mesh."""
    other = Mesh(mesh.devices.reshape(4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def fn(x):
        total = on(mesh, P("data"), P("data"))(lambda x: vary(lax.psum(x, "data"), "data"))(x)
        spec = P(("x", "y"))
        return on(other, spec, spec)(lambda x: lax.ppermute(x, "x", ring(4)))(jnp.sin(total))

    return fn, (shape(mesh, P("data"), 8, 16),)


@clean(reduced(64, "data"), gathered(2 * 64, "model"), axes=GRID)
def devices_in_another_order(mesh):
    """Groups are of places in the mesh, whatever numbers the devices there have."""
    backwards = Mesh(mesh.devices[::-1, ::-1], mesh.axis_names, axis_types=mesh.axis_types)

    def body(x):
        return vary(lax.psum(x, "data"), *GRID) + lax.all_gather(x, "model").sum(0)

    return per_device(backwards, body)


@clean(reduced(64, "data", trips=3), axes=LINE)
def shard_map_inside_a_scan(mesh):
    def fn(x):
        def step(carry, _):
            total = on(mesh, P("data"), P("data"))(lambda x: vary(lax.psum(x, "data"), "data"))
            return jnp.sin(total(carry)), None

        return lax.scan(step, x, None, length=3)[0]

    return fn, (shape(mesh, P("data"), 8, 16),)


@clean(permuted(64, "data"), reduced(64, "data"), axes=LINE)
def vmap_of_shard_map(mesh):
    def body(x):
        return vary(lax.psum(jnp.sin(lax.ppermute(x, "data", ring(8))), "data"), "data")

    fn = jax.vmap(on(mesh, P("data"), P("data"))(body), in_axes=1, out_axes=1)
    return fn, (shape(mesh, P("data"), 8, 16),)
