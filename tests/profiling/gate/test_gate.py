"""The gate refuses every program that communicates unasked, and no other."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from audit_cases import P, mesh_of, on, tag, vary
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding

import txcore as tx
from txcore import _compat
from txcore.profiling import AutoShardingError, no_auto_collectives

HERE = "test_gate.py"


def put(mesh, spec, *dims):
    """Place 0, 1, 2, ... as an array of these dims."""
    host = np.arange(np.prod(dims), dtype=np.float32).reshape(dims)
    return jax.device_put(host, NamedSharding(mesh, spec))


def line_of(fn, below=0):
    return f"{HERE}:{fn.__code__.co_firstlineno + below}"


def refused(fn, *args, **options):
    """Run a call in a gate, expect its refusal and return the error."""
    with no_auto_collectives(**options), pytest.raises(AutoShardingError) as caught:
        fn(*args)
    return caught.value


def matmul(mesh):
    return jnp.dot, (put(mesh, P(None, "data"), 8, 16), put(mesh, P("data"), 16, 4))


def out_shardings(mesh):
    fn = jax.jit(lambda x: x * 2, out_shardings=NamedSharding(mesh, P()))
    return fn, (put(mesh, P("data"), 8),)


def sharding_constraint(mesh):
    whole = NamedSharding(mesh, P())
    fn = jax.jit(lambda x: lax.with_sharding_constraint(x * 3, whole) * 2)
    return fn, (put(mesh, P("data"), 8),)


def boundary(mesh):
    return jax.jit(on(mesh, P(), P())(lambda x: x * 2)), (put(mesh, P("data"), 8),)


def eager_on_mismatched_shardings(mesh):
    return jnp.add, (put(mesh, P("data"), 8, 8), put(mesh, P(None, "data"), 8, 8))


def not_jitted(mesh):
    return jnp.sum, (put(mesh, P("data"), 8),)


def partial_auto_under_a_tag(mesh):
    """On jax 0.10 the partitioner's own all-gather has the user's tag, op_name and no mark."""

    def body(x):
        with tag("all_gather/x"):
            return lax.all_gather(x, "data", tiled=True)

    fn = on(mesh, P("data"), P("data"), axis_names={"data"})(body)
    return jax.jit(fn), (put(mesh, P("data", "model"), 8, 8),)


def matmul_under_a_tag(mesh):
    def dot(x, y):
        with tag("psum/x"):
            return x @ y

    return jax.jit(dot), (put(mesh, P(None, "data"), 8, 8), put(mesh, P("data"), 8, 8))


ASKED_BY_NOBODY = [
    matmul,
    out_shardings,
    sharding_constraint,
    boundary,
    eager_on_mismatched_shardings,
    not_jitted,
    partial_auto_under_a_tag,
    matmul_under_a_tag,
]


@pytest.mark.parametrize("build", ASKED_BY_NOBODY)
def test_what_nobody_asked_for_is_refused_each_time(build):
    fn, args = build(mesh_of(data=4, model=2))
    first, again = refused(fn, *args), refused(fn, *args)
    assert str(first) == str(again)
    assert {c.origin for c in first.report.unexplained} <= {"partitioner", "boundary"}
    assert first.report.unexplained


def test_the_error_names_the_program_op_axis_bytes_line_and_remedy():
    def total(x):
        return x.sum(0)

    x = put(mesh_of(data=4, model=2), P("data"), 8, 16)

    def call():
        return jax.jit(total)(x)

    lines = str(refused(call)).splitlines()
    here = pathlib.Path(__file__).parent
    folder = (
        f"{here.relative_to(pathlib.Path.cwd())}/" if pathlib.Path.cwd() in here.parents else ""
    )
    assert lines[0] == (
        "no_auto_collectives required that nobody communicates unasked, but compiling jit(total), "
        f"called at {folder}{line_of(call, 1)}, adds 1:"
    )
    # 16 float32 sums on each of 4 devices; a ring sends 2 * 3/4 of them.
    row = ["all-reduce", "data", "4", "f32", "64", "B", "96", "B", "1", "partitioner", "-"]
    assert lines[3].split() == [*row, line_of(total, 1)]
    assert lines[4].endswith(": jit(total)/reduce_sum")
    assert lines[5] == (
        "write the communication out (jax.shard_map with txcore's collectives), give the arguments "
        "and results the shardings that the program wants, or let it through: "
        "no_auto_collectives(allow={'partitioner'})"
    )


def test_the_refused_program_does_not_run():
    ran = []

    def fn(x):
        jax.debug.callback(lambda: ran.append(1))
        return x.sum()

    refused(jax.jit(fn), put(mesh_of(data=8), P("data"), 8))
    jax.effects_barrier()
    assert not ran


def test_what_was_compiled_before_is_refused():
    fn, args = matmul(mesh_of(data=4, model=2))
    fn = jax.jit(fn)
    fn(*args)
    refused(fn, *args)
    fn(*args)  # and outside of the gate it still runs


def test_what_was_lowered_before_is_refused():
    fn, args = matmul(mesh_of(data=4, model=2))
    lowered = jax.jit(fn).lower(*args)
    refused(lowered.compile)
    refused(lowered.compile, {"xla_cpu_enable_fast_math": True})


def test_what_was_lowered_before_passes_only_where_xla_marks_its_own():
    fn, args = psum_tagged(mesh_of(data=4, model=2))
    lowered = jax.jit(fn).lower(*args)
    if _compat.marks_partitioner():
        with no_auto_collectives():
            lowered.compile()
    else:
        assert str(refused(lowered.compile)) == (
            "no_auto_collectives needs the traced program of jit(<lambda>) to tell its author's "
            "collectives from the partitioner's, which jax 0.10.2 does not mark, but it was "
            "lowered outside of the block: lower it inside"
        )
    with no_auto_collectives(allow={"partitioner"}):
        lowered.compile()


def test_what_is_traced_before_and_lowered_in_the_block_is_compared_with_its_trace():
    mesh = mesh_of(data=4, model=2)
    fn, args = psum_tagged(mesh)
    traced = jax.jit(fn).trace(*args)
    lie = partial_auto_under_a_tag(mesh)
    with no_auto_collectives():
        traced.lower().compile()
        with pytest.raises(AutoShardingError):
            lie[0].lower(*lie[1]).compile()


def psum_tagged(mesh):
    fn = on(mesh, P("data"), P())(lambda x: tx.psum(x.sum(0), "data"))
    return fn, (put(mesh, P("data"), 8, 4),)


def psum_plain(mesh):
    fn = on(mesh, P("data"), P())(lambda x: lax.psum(x.sum(0), "data"))
    return fn, (put(mesh, P("data"), 8, 4),)


def two_axes(mesh):
    def body(x):
        x = lax.all_gather(x, "data", tiled=True)
        return lax.ppermute(x, "model", [(0, 1), (1, 0)])

    fn = on(mesh, P("data", "model"), P("data", "model"))(body)
    return fn, (put(mesh, P("data", "model"), 8, 4),)


def scan_of_psums(mesh):
    def body(x):
        def step(carry, _):
            return vary(lax.psum(jnp.sin(carry), "data"), "data"), None

        return lax.scan(step, x, None, length=3)[0]

    return on(mesh, P("data"), P("data"))(body), (put(mesh, P("data"), 8, 4),)


def autodiffs_own_psum(mesh):
    def step(w, x):
        return jax.grad(lambda w: ((x @ w) ** 2).sum())(w)

    fn = on(mesh, (P(), P("data")), P())(step)
    return fn, (put(mesh, P(), 4, 4), put(mesh, P("data"), 8, 4))


def elementwise(mesh):
    return lambda x: jnp.sin(x) * 2, (put(mesh, P("data"), 8, 4),)


def one_device(_):
    return lambda x: (x @ x.T).sum(), (jnp.ones((4, 4)),)


CLEAN = [
    psum_tagged,
    psum_plain,
    two_axes,
    scan_of_psums,
    autodiffs_own_psum,
    elementwise,
    one_device,
]


@pytest.mark.parametrize("build", CLEAN)
def test_explicit_programs_pass_and_give_the_same(build):
    fn, args = build(mesh_of(data=4, model=2))
    plain = jax.jit(fn)(*args)
    with no_auto_collectives():
        gated = jax.jit(fn)(*args)
    np.testing.assert_array_equal(np.asarray(plain), np.asarray(gated))


def test_a_program_that_passed_is_not_compiled_again():
    traced = []

    @jax.jit
    def fn(x):
        traced.append(1)
        return x * 2

    for _ in range(3):
        with no_auto_collectives():
            fn(1.0)
    assert len(traced) == 1


def test_a_mesh_of_one_device_passes():
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    x = put(mesh, P("data"), 8)
    with no_auto_collectives():
        assert float(jnp.sum(x)) == 28
        fn = on(mesh, P("data"), P())(lambda x: tx.psum(x.sum(), "data"))
        assert float(jax.jit(fn)(x)) == 28


@pytest.mark.parametrize(
    "old, new, dims, axes, payload, wire",
    [
        # Each of 4 holders lacks 3/4 of 8 * 4 float32.
        (P("data"), P(), (8, 4), ("data",), 128, 96),
        # From 2 rows to 1 column; of its 8 elements each device holds 2.
        (P("data"), P(None, "data"), (8, 4), ("data",), 128, 24),
        (P("data"), P("model"), (8, 4), ("data", "model"), 128, 64),
    ],
)
def test_device_put_of_a_committed_array_is_refused_where_data_moves(
    old, new, dims, axes, payload, wire
):
    mesh = mesh_of(data=4, model=2)
    x = put(mesh, old, *dims)

    def move():
        return jax.device_put(x, NamedSharding(mesh, new))

    error = refused(move)
    (row,) = error.report.collectives
    assert (row.kind, row.origin, row.axes) == ("device_put", "reshard", axes)
    assert (row.payload_bytes, row.wire_bytes) == (payload, wire)
    assert row.source == line_of(move, 1)
    assert "but jax.device_put adds 1:" in str(error)
    with no_auto_collectives(allow={"reshard"}):
        np.testing.assert_array_equal(np.asarray(move()), np.asarray(x))


def test_device_put_to_and_from_one_device_is_refused():
    x = put(mesh_of(data=8), P("data"), 8)
    first, last = jax.devices()[0], jax.devices()[-1]
    assert refused(jax.device_put, x, first).report.collectives[0].wire_bytes == 7 * 4
    on_first = jax.device_put(np.ones(8, np.float32), first)
    assert refused(jax.device_put, on_first, last).report.collectives[0].wire_bytes == 8 * 4
    tree = {"there": x, "moved": on_first}
    refused(jax.device_put, tree, {"there": x.sharding, "moved": last})


def test_placing_what_moves_nothing_passes():
    mesh = mesh_of(data=8)
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    x = put(mesh, P("data"), 8)
    replicated = put(mesh, P(), 8)
    with no_auto_collectives():
        jax.device_put(np.ones(8), rows)  # from the host
        jax.device_put(jnp.ones(8), rows)  # committed to no device yet
        jax.device_put(1.0, whole)
        jax.device_put(x, rows)  # as it is
        jax.device_put(x)
        jax.device_put(replicated, rows)  # each device keeps its part
        jax.device_put(replicated, jax.devices()[3])
        jax.device_put(jax.random.split(jax.random.key(0), 8), rows)
        assert jax.jit(lambda x: jax.device_put(x, rows) * 2)(x).sharding == rows


def test_a_program_lowered_before_the_block_may_not_lie():
    fn, args = partial_auto_under_a_tag(mesh_of(data=4, model=2))
    refused(fn.lower(*args).compile)


def test_allow_lets_an_origin_through_and_no_other():
    mesh = mesh_of(data=4, model=2)
    fn, args = matmul(mesh)
    with no_auto_collectives(allow={"partitioner"}):
        jax.jit(fn)(*args)
    refused(fn, *args, allow=["reshard", "boundary", "unknown"])
    x, whole = args[0], NamedSharding(mesh, P())
    refused(jax.device_put, x, whole, allow={"partitioner", "boundary", "unknown"})
    with no_auto_collectives(allow=("partitioner", "boundary", "reshard", "unknown")):
        jax.device_put(jax.jit(fn)(*args), whole)


def test_an_explicit_reshard_needs_allow():
    mesh = Mesh(jax.devices(), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = put(mesh, P("data"), 8)
        reshard = jax.jit(lambda x: jax.sharding.reshard(x, P()))
        refused(reshard, x)
        # Since jax 0.11 XLA may name it after the argument: then it is a boundary.
        with no_auto_collectives(allow={"reshard", "boundary"}):
            assert reshard(x).sharding.spec == P(None)


@pytest.mark.parametrize(
    "allow, kind, message",
    [
        ("reshard", TypeError, "allow needs a set of origins, but got 'reshard': write"),
        (3, TypeError, "allow needs a set of origins, but got 3: write allow={'partitioner'}"),
        (
            {"resharding"},
            ValueError,
            "allow needs origins that are refused, of boundary, partitioner, reshard, unknown, "
            "but got 'resharding': leave it out (no other is refused)",
        ),
        (["autodiff"], ValueError, "but got 'autodiff': leave it out"),
        ([3], ValueError, "but got 3: leave it out"),
    ],
)
def test_a_bad_allow_is_refused(allow, kind, message):
    with pytest.raises(kind) as error:
        no_auto_collectives(allow=allow)
    assert message in str(error.value)
