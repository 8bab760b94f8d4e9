"""The inventory of a traced program's collectives."""

import jax
import jax.numpy as jnp
import numpy as np
from audit_cases import P, mesh_of, on, tag, vary
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding

from txcore.profiling.declared.collectives import list_declared
from txcore.profiling.declared.equations import meshes_of

ROWS = jnp.ones((8, 16))  # on each of 8 devices (1, 16)


def declared(body, mesh=None, out_specs=None, **options):
    mesh = mesh or mesh_of(data=4, model=2)
    spec = P(mesh.axis_names)
    fn = on(mesh, spec, spec if out_specs is None else out_specs, **options)(body)
    return list_declared(jax.jit(fn).trace(ROWS).jaxpr)


def test_each_primitive():
    def body(x):
        return (
            vary(lax.psum(x, ("data", "model")), "data", "model"),
            vary(lax.pmax(x, "data"), "data", "model"),
            lax.all_gather(x, "model", tiled=True),
            lax.psum_scatter(x, "data", scatter_dimension=1, tiled=True),
            lax.all_to_all(x, "data", 1, 0, tiled=True),
            lax.ppermute(x, "data", [(0, 1)]),
            vary(lax.all_gather(x, "data", tiled=True, to="invarying"), "data", "model"),
        )

    assert [(d.kind, d.axes, d.group_size, d.payload_bytes) for d in declared(body)] == [
        ("all-reduce", ("data", "model"), 8, 64),
        ("all-reduce", ("data",), 4, 64),
        ("all-gather", ("model",), 2, 128),
        ("reduce-scatter", ("data",), 4, 64),
        ("all-to-all", ("data",), 4, 64),
        ("collective-permute", ("data",), 4, 64),
        ("all-gather", ("data",), 4, 256),
    ]


def test_trips_multiply_and_a_while_loop_is_not_known():
    def step(carry, _=None):
        return vary(lax.psum(carry, "data"), "data", "model"), None

    def body(x):
        x = lax.scan(lambda c, _: lax.scan(step, c, None, length=3), x, None, length=5)[0]
        return lax.while_loop(lambda c: c.sum() > 0, lambda c: step(c)[0], x)

    assert [(d.trips, d.trips_known) for d in declared(body)] == [(15, True), (1, False)]


def test_goes_through_every_kind_of_call():
    @jax.custom_vjp
    def custom(x):
        return lax.psum(x, "data")

    custom.defvjp(lambda x: (custom(x), None), lambda _, g: (vary(g, "data"),))

    @jax.custom_jvp
    def custom_forward(x):
        return lax.psum(x, "data")

    custom_forward.defjvps(lambda t, out, x: t)

    def body(x):
        calls = [
            custom,
            custom_forward,
            jax.jit(lambda v: lax.psum(v, "data")),
            jax.checkpoint(lambda v: lax.psum(v, "data")),
            lambda v: lax.cond(v.sum() > 0, custom, custom, v),
            jax.vmap(lambda v: lax.psum(v, "data")),
        ]
        return sum(vary(call(x), "data", "model") for call in calls)

    found = declared(body, check_vma=False)
    assert [d.payload_bytes for d in found] == [64] * 7


def test_tag_source_and_autodiff():
    def loss(w, x):
        with tag("all_gather/w"):
            whole = lax.all_gather(w, "data", tiled=True)
        return (whole.sum() * x).sum()

    def body(x):
        w = jnp.ones((4,))  # invariant: autodiff casts it and sums its gradient
        own, gathered = jax.grad(lambda w, x: (w.sum() * x).sum())(w, x), jax.grad(loss)(x, x)
        return vary(own.sum(), "data", "model") + gathered

    found = {(d.kind, d.axes): d for d in declared(body)}
    forward = found["all-gather", ("data",)]
    backward = found["reduce-scatter", ("data",)]
    made = found["all-reduce", ("data", "model")]
    assert (forward.tag, backward.tag, made.tag) == ("all_gather/w", "all_gather/w", None)
    assert (forward.autodiff, backward.autodiff, made.autodiff) == (False, False, True)
    assert forward.source == f"test_declared.py:{loss.__code__.co_firstlineno + 2}"


def test_live_means_that_something_uses_it():
    def body(x):
        lax.psum(x[0], "data")
        return vary(lax.psum(x, "data"), "data", "model")

    mesh = mesh_of(data=4, model=2)
    jaxpr = jax.jit(on(mesh, P(("data", "model")), P(("data", "model")))(body)).trace(ROWS).jaxpr
    assert [(d.elements, d.live) for d in list_declared(jaxpr)] == [(16, False), (16, True)]


def test_groups_of_an_axis():
    groups = [[0, 1], [2, 3]]
    body = lambda x: lax.psum(x, "data", axis_index_groups=groups)  # noqa: E731
    (found,) = declared(body, check_vma=False)
    assert found.group_size == 2
    assert tuple(found.groups) == ((0, 2), (1, 3), (4, 6), (5, 7))


def test_a_partial_shard_map_knows_an_upper_bound():
    mesh = mesh_of(data=4, model=2)
    fn = on(mesh, P("data"), P(), axis_names={"data"})(lambda x: lax.psum(x, "data"))
    (found,) = list_declared(jax.jit(fn).trace(ROWS).jaxpr)
    assert not found.size_known
    assert found.payload_bytes == 2 * 16 * 4


def test_prng_keys_count_their_words():
    mesh = mesh_of(data=8)
    keys = jax.random.split(jax.random.key(0), 8)
    fn = on(mesh, P("data"), P("data"))(lambda k: lax.all_gather(k, "data", tiled=True)[:1])
    (found,) = list_declared(jax.jit(fn).trace(keys).jaxpr)
    assert (found.dtype, found.payload_bytes) == ("uint32", 8 * 2 * 4)


def test_a_pure_vmap_axis_sends_nothing():
    fn = jax.vmap(lambda x: lax.psum(x, "batch"), axis_name="batch")
    assert list_declared(jax.make_jaxpr(fn)(ROWS)) == ()


def test_meshes_are_found_once_each():
    mesh = mesh_of(data=8)
    double = on(mesh, P("data"), P("data"))(lambda x: x * 2)
    jaxpr = jax.jit(lambda x: double(double(x))).trace(ROWS).jaxpr
    assert meshes_of(jaxpr) == ((("data", 8),),)


def test_equal_operands_have_one_number():
    def body(x):
        outs = [lax.psum(v, "data") for v in (x * 2 + 1, 1 + x * 2, x * 3, jax.jit(jnp.sin)(x))]
        return sum(outs) + lax.psum(jax.jit(jnp.sin)(x), "data")

    first, again, other, sine, sine_again = (
        d.operand for d in declared(body, mesh_of(data=8), out_specs=P())
    )
    assert first == again
    assert sine == sine_again
    assert len({first, other, sine}) == 3


def test_shards_of_one_array_by_different_specs_are_different_values():
    mesh = mesh_of(data=4, model=2)

    def body(x, y):
        return lax.psum(x[:1, :8], "data"), lax.psum(y[:1, :8], "data")

    specs = (P("data", None), P("data", "model"))
    fn = on(mesh, specs, (P(), P(None, "model")))(body)
    first, second = list_declared(jax.jit(lambda x: fn(x, x)).trace(ROWS).jaxpr)
    assert first.operand != second.operand


def test_a_reshard_declares_itself():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"),
                axis_types=(AxisType.Explicit,) * 2)  # fmt: skip
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        jaxpr = jax.jit(lambda x: jax.sharding.reshard(x, P(None, "data"))).trace(x).jaxpr
    (found,) = list_declared(jaxpr)
    assert (found.kind, found.primitive, found.elements, found.live) == (
        "reshard", "reshard", 8 * 16, True,
    )  # fmt: skip


def test_a_reshard_to_the_same_sharding_declares_nothing():
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Explicit,))
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        jaxpr = jax.jit(lambda x: jax.sharding.reshard(x, P("data"))).trace(x).jaxpr
    assert list_declared(jaxpr) == ()
