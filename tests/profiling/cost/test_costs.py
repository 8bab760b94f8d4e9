"""The costs of whole programs: counted by hand on CPU, bounded by hand for a TPU and a GPU."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from txcore.cli import main
from txcore.profiling import Collective, Report, costs
from txcore.profiling.cost.memory import Memory, memory_of
from txcore.profiling.cost.model import Total, total_by_axis
from txcore.profiling.cost.text import format_flops, format_seconds

LAYERS, WIDTH, BATCH = 2, 4096, 8192
PRODUCTS = 2 * LAYERS + LAYERS - 1  # forward, and backward to weights and to inputs but the first


def on_mesh(mesh, shape, spec, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def build(mesh, layers=LAYERS, width=WIDTH, batch=BATCH):
    """Return a training step of a perceptron that sums each layer's gradient over "data"."""

    def loss(ws, x):
        for w in ws:
            x = jax.nn.relu(x @ w)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    def step(ws, x):
        local = [lax.pcast(w, "data", to="varying") for w in ws]
        grads = [lax.psum(g, "data") for g in jax.grad(loss)(local, x)]
        return [w - 0.1 * g for w, g in zip(ws, grads, strict=True)]

    fn = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    weights = [on_mesh(mesh, (width, width), P())] * layers
    args = (weights, on_mesh(mesh, (batch, width), P("data")))
    return jax.jit(fn, donate_argnums=0), args


def build_small(mesh):
    return build(mesh, layers=2, width=256, batch=64)


def build_auto(mesh):
    """Return a product that the partitioner has to sum."""
    whole = NamedSharding(mesh, P())
    fn = jax.jit(jnp.matmul, out_shardings=whole)
    return fn, (on_mesh(mesh, (8, 64), P(None, "data")), on_mesh(mesh, (64, 8), P("data")))


def row(kind="all-reduce", axes=("data",), n=4, payload=100, wire=150, trips=1, op="a", **more):
    return Collective(
        kind, "user", (), axes, n, "float32", "float32", payload, wire, trips, "", "", op=op, **more
    )


def test_totals_by_axis():
    report = Report(
        (
            row(op="a", trips=3),
            row(op="b", payload=10, wire=15),
            row(op="b", payload=1, wire=2),  # of one merged op, what has another origin
            row(op="c", axes=("model",), n=2, payload=1000, wire=1000),
            row("all-gather", op="d", payload=40, wire=30),
            row("custom-call", op="e"),
            row("unknown", op="f"),
        )
    )
    assert total_by_axis(report) == (
        Total("all-reduce", ("model",), 2, 1, 1000, 1000, 1.0),
        Total("all-reduce", ("data",), 4, 4, 311, 467, 1.5),
        Total("all-gather", ("data",), 4, 1, 40, 30, 0.75),
    )


def test_a_training_step_on_cpu():
    found = costs(build_small, target="cpu:8", mesh={"data": 8}, at_least=1000)
    matrix = 256 * 256 * 2
    (total,) = found.totals
    assert (total.kind, total.axes, total.group_size) == ("all-reduce", ("data",), 8)
    assert (total.payload_bytes, total.bus_factor) == (2 * matrix, 1.75)
    assert total.wire_bytes == 2 * 2 * matrix * 1.75  # CPU sums in float32
    assert found.schedule.flops == (2 * 2 + 1) * 2 * 8 * 256 * 256
    assert found.schedule.seconds is None
    assert not any(overlap.is_async for overlap in found.schedule.overlaps)
    assert found.memory.arguments == 2 * matrix + 8 * 256 * 2
    assert found.memory.reused == 2 * matrix
    # The batch is sharded; the weights are not.
    assert [r.path for r in found.replicated] == ["args[0][0]", "args[0][1]"]
    assert [r.saved_bytes for r in found.replicated] == [matrix * 7 // 8] * 2
    text = str(found)
    assert "one call on each device of cpu:8 (data=8):" in text
    assert "nothing is asynchronous, so all communication is exposed" in text
    assert "replicated, though sharding would save 229 kB on each device:" in text
    assert "give target= for the time of a TPU or GPU" in text


def test_a_program_of_one_device():
    found = costs(lambda x: x @ x, jnp.ones((64, 64)))
    assert (found.totals, found.replicated, found.schedule.overlaps) == ((), (), ())
    assert found.schedule.flops == 2 * 64**3
    assert "no collective in the program" in str(found)


def test_json_is_canonical_and_complete():
    found = costs(build_small, target="cpu:8", mesh={"data": 8}, at_least=1000)
    text = found.to_json()
    read = json.loads(text)
    assert text == json.dumps(read, sort_keys=True, separators=(",", ":"))
    assert read == json.loads(json.dumps(found.to_dict()))
    assert read["mesh"] == {"data": 8}
    assert read["memory"]["reused"] == found.memory.reused
    assert read["totals"][0]["axes"] == ["data"]
    assert read["replicated"][0]["shard_axes"] == ["data"]
    overlaps = read["schedule"]["overlaps"]
    assert {o["kind"] for o in overlaps} == {"all-reduce"}
    assert all(o["axes"] == ["data"] and o["hidden"] is None for o in overlaps)


def test_long_names_fit_100_columns():
    found = costs(build_small, target="cpu:8", mesh={"data": 8}, at_least=1000)
    name = "x" * 200
    overlaps = tuple(
        dataclasses.replace(o, op=name, trips=10**6, note="n" * 200, is_async=True, seconds=1.0,
                            exposed_seconds=0.5, flops=10**18, bytes=10**15)
        for o in found.schedule.overlaps
    )  # fmt: skip
    long = dataclasses.replace(
        found,
        replicated=tuple(
            dataclasses.replace(r, path=name, shape=(4096,) * 5, axes=(name,), shard_axes=(name,))
            for r in found.replicated
        ),
        schedule=dataclasses.replace(
            found.schedule, overlaps=overlaps, compute_seconds=1.0, exposed_seconds=0.5
        ),
        memory_size=1000,
    )
    assert max(map(len, str(long).splitlines())) <= 100
    assert "DOES NOT FIT" in str(long)


def test_memory_where_the_compiler_says_little():
    class Compiled:
        def __init__(self, said):
            self.memory_analysis = lambda: said

    assert memory_of(Compiled(None)) is None
    said = type("Said", (), {"argument_size_in_bytes": 10, "temp_size_in_bytes": 5})()
    assert memory_of(Compiled(said)) == Memory(10, 0, 0, 5, 0, 15)


@pytest.mark.parametrize(
    "number, text",
    [(0, "0 FLOP"), (999, "999 FLOP"), (34_359_738_368, "34.4 GFLOP"), (10**15, "1e+03 TFLOP")],
)
def test_flops_as_text(number, text):
    assert format_flops(number) == text


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0 ns"), (5e-10, "0.5 ns"), (4.05e-4, "405 us"), (0.9999e-3, "1 ms"), (90.0, "90 s")],
)
def test_times_as_text(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: costs(3), TypeError, "needs a function .* but got a int"),
        (lambda: costs(jax.jit(jnp.sin).lower(1.0).compile()), TypeError, "but got a Compiled"),
        (lambda: costs(jnp.sin, 1.0, mesh={"data": 2}), TypeError, "needs target= with mesh="),
        (lambda: costs(build, 1.0, target="cpu:8"), TypeError, "got 1 arguments more"),
        (lambda: costs(build, target="cpu"), ValueError, "a target needs to be as"),
        (lambda: costs(build, target="cpu:8", mesh={"data": 3}), ValueError, "multiply to its 8"),
        (lambda: costs(jnp.sin, 1.0, at_least=-1), ValueError, "at least 0, but got -1"),
    ],
)
def test_what_is_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()


COMMAND = ("costs", f"{__name__}:build_small", "--mesh", "data=8")


def test_the_command(capsys):
    assert main(COMMAND) == 0
    out = capsys.readouterr().out
    assert "step: 5.24 MFLOP" in out
    assert "proved: " in out.splitlines()[-1]
    assert main([*COMMAND, "--json", "--at-least", "1000"]) == 0
    assert len(json.loads(capsys.readouterr().out)["replicated"]) == 2


def test_the_command_on_a_target(capsys):
    assert main([*COMMAND, "--target", "cpu:8"]) == 0
    assert "of cpu:8 (data=8)" in capsys.readouterr().out


def test_the_commands_exit_codes(capsys):
    assert main(["costs", f"{__name__}:build_auto", "--mesh", "data=8"]) == 1
    assert "failed" in capsys.readouterr().out
    assert main([*COMMAND, "--target", "tpu:v9:1"]) == 2
    assert "needs a known chip" in capsys.readouterr().err
    assert main([*COMMAND, "--at-least", "0"]) == 2
    assert "needs a number of at least 1" in capsys.readouterr().err


def needs(package):
    absent = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(absent, reason=f"needs {package}")


TARGETS = [
    pytest.param("tpu:v5e:2x4", 197e12, 800e9, 4 * 50e9, marks=needs("libtpu")),
    pytest.param("cuda:h100:8", 989.4e12, 3350e9, 450e9, marks=needs("jax_cuda12_plugin")),
]


@pytest.mark.parametrize("target, peak, memory, links", TARGETS)
def test_the_roofline_bounds_a_step_on_a_target(target, peak, memory, links):
    found = costs(build, target=target, mesh={"data": 8})
    plan, matrix = found.schedule, WIDTH * WIDTH * 2
    assert plan.flops == PRODUCTS * 2 * (BATCH // 8) * WIDTH * WIDTH
    # Not faster than the products at the peak, nor than writing the new weights.
    computing = max(plan.flops / peak, LAYERS * matrix / memory)
    # Each product alone moves under 4 matrices, and so does each update.
    moving = (PRODUCTS + LAYERS) * 4 * matrix / memory
    assert computing <= plan.compute_seconds <= computing + moving
    wire = LAYERS * matrix * 1.75
    assert wire / links <= plan.communication_seconds <= 4 * wire / links
    assert 0 <= plan.exposed_seconds <= plan.communication_seconds * (1 + 1e-9)
    assert plan.seconds == pytest.approx(plan.compute_seconds + plan.exposed_seconds)
    assert found.totals[0].wire_bytes == wire
    assert found.memory.arguments == LAYERS * matrix + (BATCH // 8) * WIDTH * 2
    assert f"one call on each device of {target} (data=8)" in str(found)
    assert max(map(len, str(found).splitlines())) <= 100


@pytest.mark.parametrize("target, peak, memory, links", TARGETS)
def test_a_ring_of_permutes_is_partly_hidden(target, peak, memory, links):
    """Products with one part of a matrix while the next part arrives."""

    def ring(mesh):
        def product(x, w):
            out = jnp.zeros((x.shape[0], w.shape[1]), jnp.float32)
            for i in range(8):
                ahead = (
                    lax.ppermute(w, "data", [(j, (j + 1) % 8) for j in range(8)]) if i < 7 else w
                )
                out, w = out + jnp.dot(x, w, preferred_element_type=jnp.float32), ahead
            return out

        rows = P("data")
        shape = on_mesh(mesh, (8 * WIDTH, WIDTH), rows)
        fn = jax.shard_map(product, mesh=mesh, in_specs=(rows, rows), out_specs=rows)
        return fn, (shape, shape)

    found = costs(ring, target=target, mesh={"data": 8}).schedule
    assert len(found.overlaps) == 7
    assert found.flops == 8 * 2 * WIDTH**3
    hiding = [o for o in found.overlaps if o.is_async and o.flops]
    assert hiding
    for overlap in hiding:
        # Its link's time against the products that are scheduled in it, at the peak.
        assert overlap.flops >= 2 * WIDTH**3
        least = min(1.0, overlap.flops / peak / overlap.seconds)
        assert overlap.hidden >= 0.99 * least
    assert found.hidden > 0.3
