"""The same program has the same lock, byte for byte, however it is compiled.

The expected files in locks/ are the same for every version of jax, and for a compiler that does
not combine, hoist or deduplicate; their bytes are counted by hand here.
"""

import pathlib
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from audit_cases import P, mesh_of, on, shape, tag, vary
from jax import lax

import txcore as tx
from txcore.profiling import audit
from txcore.profiling.lock import check, lock_of
from txcore.profiling.lock.file import format_locks

LOCKS = pathlib.Path(__file__).parent / "locks"
HERE = pathlib.Path(__file__).name
F32, BF16 = 4, 2
PROGRAMS = {}
# What versions of XLA do differently: combine, hoist, deduplicate.
PASSES = "cpu-all-reduce-combiner,all-reduce-combiner,while-loop-invariant-code-motion,cse"


def program(payload, **sizes):
    """Register a program on a mesh of these sizes, with its bytes by tag or file."""

    def register(build):
        PROGRAMS[build.__name__] = (build, payload, sizes)
        return build

    return register


KERNEL, DENSE, BIAS = 3 * 3 * 8, 72 * 10, 10


@program(
    {
        "psum/bucket.bf16": BF16 * (KERNEL + DENSE + BIAS),
        "pmean/grads.bias": F32 * BIAS,
        "pmean/grads.dense": F32 * DENSE,
        "pmean/grads.kernel": F32 * KERNEL,
        "pmean/loss": F32,
        "psum/example_count": F32,
    },
    data=4,
    model=2,
)
def data_parallel(mesh):
    """Gradients leaf by leaf and as a bucket in bfloat16, the loss, and a metric nobody uses."""

    def step(weights, x, mask):
        varying = tx.vary(weights, "data", name="unused")

        def loss(w):
            out = (x * w["kernel"].reshape(-1)) @ w["dense"] + w["bias"]
            return tx.example_mean((out**2).sum(1), mask, axis="data")

        value, grads = jax.value_and_grad(loss)(varying)
        tx.pmax(value, "data", name="dead")
        flat = jnp.concatenate([g.ravel() for g in jax.tree.leaves(grads)])
        bucket = tx.psum(flat.astype(jnp.bfloat16), "data", name="bucket.bf16")
        grads = tx.pmean(grads, "data", name="grads")
        return grads, bucket, tx.pmean(value, "data", name="loss")

    sizes = {"kernel": (3, 3, 8), "dense": (72, 10), "bias": (10,)}
    weights = {name: shape(mesh, P(), *dims) for name, dims in sizes.items()}
    args = weights, shape(mesh, P("data"), 16, 72), shape(mesh, P("data"), 16)
    return on(mesh, (P(), P("data"), P("data")), P())(step), args


@program(
    {
        "psum/down": 3 * F32 * 8 * 64,  # two layers, and a third that is the first one again
        "vary/in": F32 * 8 * 64,  # the transpose of the second layer's vary
        "all_gather/logits": F32 * 8 * 64,
        HERE: 2 * 2 * F32 * 64 * 16,  # autodiff's sums over the data, of both weights in both
    },
    data=2,
    model=4,
)
def tensor_parallel(mesh):
    """An MLP split over `model`, its gradients left to autodiff, and a layer computed twice."""

    def layer(w, x):
        hidden = jnp.tanh(tx.vary(x, "model", name="in") @ w[0])
        return tx.psum(hidden @ w[1], "model", name="down")

    def step(w, x):
        grads = jax.grad(lambda w: (layer(w, layer(w, x)) ** 2).sum())(w)
        logits = tx.vary(layer(w, x), "model")[:, :16]
        return grads, tx.all_gather(logits, "model", name="logits", dim=1)

    specs = (P(None, "model"), P("model"))
    weights = tuple(shape(mesh, spec, 64, 64) for spec in specs)
    wrapped = on(mesh, (specs, P("data")), (specs, P("data", "model")))(step)
    return wrapped, (weights, shape(mesh, P("data"), 16, 64))


@program(
    {
        "ring": 5 * BF16 * 2 * 16,
        "hoisted": 5 * F32 * 2 * 16,
        "summed": 5 * 2 * F32 * 2 * 16,
        "gathered": 8 * BF16 * 2 * 16,
        HERE: 3 * 5 * F32 * 2 * 16 + F32 * 2 * 16,
    },
    data=4,
    model=2,
)
def scanned(mesh):
    """Loops within loops; one reduction does not change in them, two are equal; dtypes differ."""
    ring = [(i, (i + 1) % 4) for i in range(4)]

    def step(x):
        def inner(carry, _):
            return vary(lax.psum(carry, "model"), "model") / 2, None

        def body(carry, _):
            with tag("ring"):
                moved = lax.ppermute(carry.astype(jnp.bfloat16), "data", ring)
            with tag("hoisted"):
                fixed = vary(lax.psum(x, "data"), "data")
            with tag("summed"):
                once = vary(lax.psum(carry, "data"), "data")
            with tag("summed"):
                twice = vary(lax.psum(carry, "data"), "data")
            carry, _ = lax.scan(inner, moved + fixed + once * twice, length=3)
            return carry, None

        carry, _ = lax.scan(body, x, length=5)
        with tag("gathered"):
            last = lax.all_gather(carry.astype(jnp.bfloat16), ("model", "data"), tiled=True)
        return carry + lax.pmax(carry, "data") + last[:2]

    spec = P(("data", "model"))
    return on(mesh, spec, spec)(step), (shape(mesh, spec, 16, 16),)


def report_of(name, **options):
    build, _, sizes = PROGRAMS[name]
    fn, args = build(mesh_of(**sizes))
    return audit(jax.jit(fn, compiler_options=options), *args)


@pytest.mark.parametrize("name", PROGRAMS)
def test_its_bytes_are_those_counted_by_hand(name):
    found: Counter[str] = Counter()
    for entry in lock_of(report_of(name)).entries:
        found[entry.tag or entry.source] += entry.payload_bytes
    assert found == PROGRAMS[name][1]


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_lock_is_the_same_on_every_version(name):
    report, expected = report_of(name), LOCKS / f"{name}.lock.json"
    assert format_locks([lock_of(report)]) == expected.read_text(), f"jax {jax.__version__}"
    assert check(expected, report, exact=True).ok


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_lock_is_the_same_for_another_compiler(name):
    report, other = report_of(name), report_of(name, xla_disable_hlo_passes=PASSES)
    assert len(other.collectives) > len(report.collectives)
    assert lock_of(other) == lock_of(report)
