"""Explicit programs: the collectives that they ask for, their bytes counted by hand.

Payload is nccl-tests' S: the bytes of the operand on one device, times n for an all-gather.
`rows(mesh)` is one row of 16 numbers on each of 8 devices: 64 bytes of float32. XLA for TPU turns
scatters as small as these into sums, of the same payload.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from audit_cases import P, on, shape, tag, vary
from corpus.corpus_programs import Program
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh

import txcore as tx


@dataclass(frozen=True)
class Moves:
    """A collective that a program asks for: `payload` bytes in each of `trips` executions."""

    kind: str
    axes: tuple[str, ...]
    dtype: str
    payload: int
    trips: int = 1


@dataclass(frozen=True)
class Clean(Program):
    """An explicit program with its collectives; not `exact` where autodiff makes some of them.

    moves: what is on the wire on CPU; elsewhere: on another platform, where its compiler does
      what that of CPU does not (merge equal collectives, leave out those that need no wire).
    """

    moves: tuple[Moves, ...] = ()
    elsewhere: Mapping[str, tuple[Moves, ...]] = field(default_factory=dict)
    exact: bool = True

    def moves_on(self, platform: str) -> tuple[Moves, ...]:
        return self.elsewhere.get(platform, self.moves)


CLEAN: dict[str, Clean] = {}
AXES = ("data", "model", "pipe")
CUBE = {"data": 2, "model": 2, "pipe": 2}
GRID = {"data": 4, "model": 2}
LINE = {"data": 8}


def clean(*moves: Moves, axes: Mapping[str, int] = CUBE, **more: Any):
    def register(build):
        CLEAN[build.__name__] = Clean(build, axes, moves=moves, **more)
        return build

    return register


def reduced(payload, *axes, dtype="float32", trips=1):
    return Moves("all-reduce", axes, dtype, payload, trips)


def gathered(payload, *axes, dtype="float32", trips=1):
    return Moves("all-gather", axes, dtype, payload, trips)


def scattered(payload, *axes, dtype="float32", trips=1):
    return Moves("reduce-scatter", axes, dtype, payload, trips)


def exchanged(payload, *axes, dtype="float32", trips=1):
    return Moves("all-to-all", axes, dtype, payload, trips)


def permuted(payload, *axes, dtype="float32", trips=1):
    return Moves("collective-permute", axes, dtype, payload, trips)


def rows(mesh, dtype=jnp.float32):
    return shape(mesh, P(mesh.axis_names), 8, 16, dtype=dtype)


def per_device(mesh, body, *dtypes, **options):
    """Shard arguments of 8 rows and the result over all devices."""
    spec = P(mesh.axis_names)
    args = tuple(rows(mesh, dtype) for dtype in dtypes or (jnp.float32,))
    return on(mesh, spec, spec, **options)(body), args


def ring(n):
    return [(i, (i + 1) % n) for i in range(n)]


# --- every collective of txcore ---


@clean(reduced(64, "data"))
def tx_psum(mesh):
    return per_device(mesh, lambda x: tx.vary(tx.psum(x, "data"), AXES))


@clean(reduced(64, *AXES))
def tx_psum_over_three_axes(mesh):
    return per_device(mesh, lambda x: tx.vary(tx.psum(x, AXES), AXES))


@clean(reduced(64, "data", "pipe"))
def tx_pmean_over_two_axes(mesh):
    return per_device(mesh, lambda x: tx.vary(tx.pmean(x, ("data", "pipe")), AXES))


@clean(reduced(64, "model"), reduced(64, "data", "pipe"))
def tx_pmax_and_pmin(mesh):
    def body(x):
        return tx.vary(tx.pmax(x, "model"), AXES) + tx.vary(tx.pmin(x, ("data", "pipe")), AXES)

    return per_device(mesh, body)


@clean(gathered(2 * 64, "model"))
def tx_all_gather(mesh):
    return per_device(mesh, lambda x: tx.all_gather(x, "model")[:1] * 2)


@clean(gathered(8 * 64, *AXES))
def tx_all_gather_invariant(mesh):
    def body(x):
        return tx.all_gather(x, AXES, invariant=True)

    return on(mesh, P(AXES), P())(body), (rows(mesh),)


@clean(scattered(64, "pipe"), elsewhere={"tpu": (reduced(64, "pipe"),)})
def tx_reduce_scatter(mesh):
    return per_device(mesh, lambda x: tx.reduce_scatter(x, "pipe", dim=1, mean=True))


@clean(exchanged(64, "data"))
def tx_all_to_all(mesh):
    return per_device(mesh, lambda x: tx.all_to_all(x, "data", split_dim=1, concat_dim=0))


@clean(permuted(64, "data"), permuted(64, "model"))
def tx_ppermute_and_shift(mesh):
    def body(x):
        return tx.shift(jnp.sin(tx.ppermute(x, "data", [(0, 1)])), "model")

    return per_device(mesh, body)


@clean(reduced(64, "data", "model"))
def tx_broadcast(mesh):
    return per_device(mesh, lambda x: tx.vary(tx.broadcast(x, ("data", "model"), root=1), AXES))


@clean(reduced(64, "data"), reduced(4, "data"), axes=LINE)
def tx_value_and_grad(mesh):
    def body(w, x):
        loss, grad = tx.value_and_grad(lambda w: jnp.sin(x @ w).sum(), axis="data")(
            tx.vary(w, "data")
        )
        return tx.pmean(grad, "data"), tx.pmean(loss, "data")

    args = shape(mesh, P(), 16), shape(mesh, P("data"), 8, 16)
    return on(mesh, (P(), P("data")), P())(body), args


# --- every collective of jax.lax ---


@clean(reduced(64, "data"))
def psum(mesh):
    return per_device(mesh, lambda x: vary(lax.psum(x, "data"), *AXES))


@clean(reduced(64, "model"), reduced(64, "pipe"), reduced(64, "data"))
def pmean_pmax_pmin(mesh):
    def body(x):
        mean = vary(lax.pmean(x, "model"), *AXES)
        largest = vary(lax.pmax(jnp.sin(mean), "pipe"), *AXES)
        return vary(lax.pmin(jnp.cos(largest), "data"), *AXES)

    return per_device(mesh, body)


@clean(gathered(2 * 64, "data"))
def all_gather_tiled(mesh):
    return per_device(mesh, lambda x: lax.all_gather(x, "data", tiled=True).sum(0)[None])


@clean(gathered(2 * 64, "data"))
def all_gather_untiled(mesh):
    return per_device(mesh, lambda x: lax.all_gather(x, "data", axis=1).sum(1))


@clean(gathered(4 * 64, "model", "data"))
def all_gather_of_axes_out_of_order(mesh):
    def body(x):
        return lax.all_gather(x, ("model", "data"), tiled=True)[1:2] * 2

    return per_device(mesh, body)


@clean(gathered(2 * 64, "pipe"))
def all_gather_to_invarying(mesh):
    def body(x):
        return lax.all_gather(x, "pipe", tiled=True, to="invarying")

    return on(mesh, P(AXES), P(("data", "model")))(body), (rows(mesh),)


@clean(scattered(64, "data", "model"), elsewhere={"tpu": (reduced(64, "data", "model"),)})
def psum_scatter_tiled(mesh):
    def body(x):
        return lax.psum_scatter(x, ("data", "model"), scatter_dimension=1, tiled=True)

    return per_device(mesh, body)


@clean(scattered(64, "data"), elsewhere={"tpu": (reduced(64, "data"),)})
def psum_scatter_untiled(mesh):
    def body(x):
        return lax.psum_scatter(x.reshape(2, 8), "data", scatter_dimension=0)[None]

    return per_device(mesh, body)


@clean(exchanged(64, "model"))
def all_to_all_tiled(mesh):
    return per_device(mesh, lambda x: lax.all_to_all(x, "model", 1, 0, tiled=True))


@clean(exchanged(64, "data", "pipe"))
def all_to_all_untiled(mesh):
    def body(x):
        return lax.all_to_all(x.reshape(4, 4), ("data", "pipe"), 0, 1)

    return per_device(mesh, body)


@clean(exchanged(64, "data", "model"))
def pswapaxes(mesh):
    return per_device(mesh, lambda x: lax.pswapaxes(x.reshape(4, 4), ("data", "model"), 0))


@clean(permuted(64, "data"))
def ppermute_without_wrap(mesh):
    return per_device(mesh, lambda x: lax.ppermute(x, "data", [(0, 1)]))


@clean(permuted(64, "data", "model"))
def ppermute_over_two_axes(mesh):
    return per_device(mesh, lambda x: lax.ppermute(x, ("data", "model"), ring(4)))


@clean(permuted(64, "data"), axes=GRID)
def pshuffle(mesh):
    return per_device(mesh, lambda x: lax.pshuffle(x, "data", [1, 3, 0, 2]))


@clean(Moves("collective-broadcast", ("data",), "float32", 64), axes=GRID, platforms=("cuda",))
def pbroadcast(mesh):
    return per_device(mesh, lambda x: lax.pbroadcast(x, ("data",), 2), check_vma=False)


@clean(Moves("ragged-all-to-all", ("data",), "float32", 64), axes=LINE, platforms=("cuda", "tpu"))
def ragged_all_to_all(mesh):
    def body(x):
        ones = vary(jnp.ones(8, jnp.int32), "data")
        at = vary(jnp.arange(8, dtype=jnp.int32), "data")
        parts = at, ones, at, ones
        return lax.ragged_all_to_all(x[0], jnp.zeros_like(x[0]), *parts, axis_name="data")[None]

    return per_device(mesh, body)


# --- groups of an axis, several axes, dtypes ---


@clean(reduced(64), axes=LINE)
def psum_in_index_groups(mesh):
    def body(x):
        return lax.psum(x, "data", axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]])

    return per_device(mesh, body, check_vma=False)


@clean(gathered(4 * 64), axes=LINE)
def all_gather_in_index_groups(mesh):
    def body(x):
        groups = [[0, 2, 4, 6], [1, 3, 5, 7]]
        return lax.all_gather(x, "data", axis_index_groups=groups, tiled=True).sum(0)[None]

    return per_device(mesh, body, check_vma=False)


@clean(reduced(32, "data", dtype="bfloat16"))
def bfloat16_sum(mesh):
    """Counted in the declared dtype, whatever the platform promotes it to."""
    return per_device(mesh, lambda x: vary(lax.psum(x, "data"), *AXES), jnp.bfloat16)


@clean(
    *[gathered(2 * 32, "data", dtype="bfloat16"), scattered(32, "model", dtype="bfloat16")],
    elsewhere={
        "tpu": (gathered(2 * 32, "data", dtype="bfloat16"), reduced(32, "model", dtype="bfloat16"))
    },
)
def bfloat16_gather_and_scatter(mesh):
    def body(x):
        whole = lax.all_gather(x, "data", tiled=True)
        return lax.psum_scatter(whole.sum(0)[None], "model", scatter_dimension=1, tiled=True)

    return per_device(mesh, body, jnp.bfloat16)


@clean(reduced(64, "data", dtype="int32"), reduced(16, "pipe", dtype="uint8"))
def integer_sums(mesh):
    def body(x, y):
        return vary(lax.psum(x, "data"), *AXES), vary(lax.pmax(y, "pipe"), *AXES)

    return per_device(mesh, body, jnp.int32, jnp.uint8)


@clean(reduced(64, "data", dtype="int32"), gathered(2 * 16, "model", dtype="bool"))
def booleans(mesh):
    """Counted as int32 when they are summed, and moved as they are."""

    def body(x):
        whole = lax.all_gather(x, "model", tiled=True)
        return tx.vary(tx.psum(x, "data"), AXES) + whole.all(0)[None]

    return per_device(mesh, body, jnp.bool_)


@clean(reduced(128, "data", dtype="complex64"), permuted(128, "pipe", dtype="complex64"))
def complex_numbers(mesh):
    def body(x):
        return lax.ppermute(jnp.sin(vary(lax.psum(x, "data"), *AXES)), "pipe", ring(2))

    return per_device(mesh, body, jnp.complex64)


# --- pytrees, the combiner, buckets ---


@clean(reduced(64, *AXES), reduced(8, *AXES), reduced(4, *AXES))
def tree_of_three(mesh):
    """Three psums, which the compiler combines into one op."""

    def body(x):
        return tx.psum({"w": x, "b": x[0, :2], "loss": x.sum()}, AXES)

    return on(mesh, P(AXES), P())(body), (rows(mesh),)


@clean(reduced(64, "data", dtype="float32"), reduced(32, "data", dtype="bfloat16"))
def tree_of_two_dtypes(mesh):
    """The compiler widens the bfloat16 and sends both as one: still counted as declared."""

    def body(x, y):
        x, y = lax.psum((x, y), "data")
        return vary(x, *AXES), vary(y, *AXES)

    return per_device(mesh, body, jnp.float32, jnp.bfloat16)


@clean(reduced(64, "data"), reduced(64, "data"), reduced(64, "model"))
def two_merged_and_one_of_another_axis(mesh):
    def body(x):
        with tag("psum/a"):
            a = lax.psum(x, "data")
        with tag("psum/b"):
            b = lax.psum(jnp.sin(x), "data")
        with tag("psum/c"):
            c = lax.psum(jnp.cos(x), "model")
        return vary(a, *AXES) * vary(b, *AXES) * vary(c, *AXES)

    return per_device(mesh, body)


@clean(
    *[reduced(64, "data"), reduced(64, "data")],
    elsewhere={"tpu": (reduced(64, "data"),), "cuda": (reduced(64, "data"),)},
)
def sum_of_two_sums(mesh):
    """Two psums whose results are added are one psum of the sum, where the compiler sees it."""

    def body(x):
        return tx.vary(tx.psum(x, "data") + tx.psum(jnp.sin(x), "data"), AXES)

    return per_device(mesh, body)


@clean(gathered(2 * 64, "data"), gathered(2 * 64, "data"))
def two_gathers(mesh):
    def body(x):
        a = lax.all_gather(x, "data", tiled=True)
        b = lax.all_gather(jnp.sin(x), "data", tiled=True)
        return a.sum(0)[None], b.max(0)[None]

    return per_device(mesh, body)


@clean(
    *[gathered(2 * 64, "data"), gathered(2 * 64, "data")],
    elsewhere={"cuda": (gathered(2 * 64, "data"),)},
)
def product_of_two_gathers(mesh):
    """XLA for GPU multiplies first and gathers the product."""

    def body(x):
        a = lax.all_gather(x, "data", tiled=True)
        b = lax.all_gather(jnp.sin(x), "data", tiled=True)
        return (a * b).sum(0)[None]

    return per_device(mesh, body)


@clean(reduced((16 + 4 + 1) * 4, "data"), axes=LINE)
def gradient_bucket_by_hand(mesh):
    def body(w, b, x):
        def loss(w, b):
            return jnp.sin(x @ w + b).sum()

        value, (dw, db) = jax.value_and_grad(loss, argnums=(0, 1))(vary(w, "data"), vary(b, "data"))
        flat = jnp.concatenate([dw.reshape(-1), db, value[None]])
        with tag("psum/bucket"):
            flat = lax.psum(flat, "data")
        return flat[:16].reshape(4, 4), flat[16:20], flat[20]

    args = shape(mesh, P(), 4, 4), shape(mesh, P(), 4), shape(mesh, P("data"), 8, 4)
    return on(mesh, (P(), P(), P("data")), P())(body), args


# --- control flow ---


@clean(reduced(64, "data", trips=7))
def scan(mesh):
    def body(x):
        def step(carry, _):
            return vary(lax.psum(carry, "data"), *AXES) * 0.5, None

        return lax.scan(step, x, None, length=7)[0]

    return per_device(mesh, body)


@clean(reduced(64, "data", trips=5 * 3), permuted(64, "pipe", trips=5))
def nested_scan(mesh):
    def body(x):
        def inner(carry, _):
            return vary(lax.psum(carry, "data"), *AXES) * 0.5, None

        def outer(carry, _):
            carry = lax.ppermute(jnp.sin(carry), "pipe", ring(2))
            return lax.scan(inner, carry, None, length=3)[0], None

        return lax.scan(outer, x, None, length=5)[0]

    return per_device(mesh, body)


@clean(
    *[gathered(2 * 64, "model", trips=4), scattered(2 * 64, "model", trips=4)],
    elsewhere={"tpu": (reduced(2 * 64, "model", trips=4), reduced(2 * 64, "model", trips=4))},
)
def scan_that_unrolls_by_two(mesh):
    def body(x):
        def step(carry, _):
            whole = jnp.sin(lax.all_gather(carry, "model", axis=1, tiled=True))
            part = lax.psum_scatter(whole, "model", scatter_dimension=1, tiled=True)
            return part * 0.5, None

        return lax.scan(step, x, None, length=4, unroll=2)[0]

    return per_device(mesh, body)


@clean(permuted(64, "data"), reduced(4, *AXES))
def while_loop(mesh):
    """Nobody knows how often it runs: counted once, in the body and in the condition."""

    def body(x):
        def is_large(x):
            return lax.psum(jnp.sum(x * x), AXES) > 1.0

        return lax.while_loop(is_large, lambda x: lax.ppermute(x * 0.5, "data", ring(2)), x)

    return per_device(mesh, body)


@clean(reduced(64, "data"), reduced(64, "data"))
def both_branches_of_cond(mesh):
    def body(x, p):
        def small(x):
            return lax.psum(jnp.sin(x), "data")

        def large(x):
            return lax.psum(jnp.cos(x), "data")

        return vary(lax.cond(p[0] > 0, small, large, x), *AXES)

    args = rows(mesh), shape(mesh, P(), 1)
    return on(mesh, (P(AXES), P()), P(AXES))(body), args


@clean(reduced(64, "data"), gathered(2 * 64, "pipe"))
def switch_with_an_empty_branch(mesh):
    def body(x, i):
        branches = (
            lambda x: vary(lax.psum(x, "data"), *AXES),
            lambda x: lax.all_gather(x, "pipe", tiled=True)[1:] * 2,
            lambda x: x * 3,
        )
        return lax.switch(i[0], branches, x)

    args = rows(mesh), shape(mesh, P(), 1, dtype=jnp.int32)
    return on(mesh, (P(AXES), P()), P(AXES))(body), args


@clean(reduced(64, "data", trips=6))
def fori_loop(mesh):
    def body(x):
        return lax.fori_loop(0, 6, lambda i, x: vary(lax.psum(jnp.sin(x), "data"), *AXES) * i, x)

    return per_device(mesh, body)


# --- derivatives ---

GATHER_AND_SCATTER = gathered(2 * 64, "data"), scattered(2 * 64, "data")
GATHER_AND_SUM = {"tpu": (gathered(2 * 64, "data"), reduced(2 * 64, "data"))}


@clean(*GATHER_AND_SCATTER, elsewhere=GATHER_AND_SUM)
def remat(mesh):
    """Declared twice, the gather of the weights is done once: its operand is the same."""

    def body(w):
        @jax.checkpoint
        def loss(w):
            with tag("all_gather/w"):
                whole = lax.all_gather(w, "data", tiled=True)
            return jnp.sin(jnp.sin(whole)).sum()

        return jax.grad(loss)(w)

    return per_device(mesh, body)


@clean(reduced(64, "data"), reduced(64, "data"))
def custom_vjp(mesh):
    @jax.custom_vjp
    def total(x):
        with tag("psum/forward"):
            return vary(lax.psum(x, "data"), *AXES)

    def backward(_, g):
        with tag("psum/backward"):
            return (vary(lax.psum(g, "data"), *AXES),)

    total.defvjp(lambda x: (total(x), None), backward)

    def body(x):
        value, grad = jax.value_and_grad(lambda x: jnp.sin(total(x)).sum())(x)
        return value + grad

    return per_device(mesh, body)


@clean(*GATHER_AND_SCATTER, elsewhere=GATHER_AND_SUM)
def gradient_through_all_gather(mesh):
    """The transpose, a reduce-scatter, carries the gather's tag."""

    def body(x):
        return jax.grad(lambda x: jnp.sin(tx.all_gather(x, "data")).sum())(x)

    return per_device(mesh, body)


@clean(*GATHER_AND_SCATTER, elsewhere=GATHER_AND_SUM, exact=False)
def gradient_through_a_plain_all_gather(mesh):
    def body(x):
        return jax.grad(lambda x: jnp.sin(lax.all_gather(x, "data", tiled=True)).sum())(x)

    return per_device(mesh, body)


@clean(
    *[scattered(64, "data"), gathered(64, "data")],
    elsewhere={"tpu": (reduced(64, "data"), reduced(64, "data"))},
)
def gradient_through_reduce_scatter(mesh):
    def body(x):
        return jax.grad(lambda x: jnp.sin(tx.reduce_scatter(x, "data", dim=1)).sum())(x)

    return per_device(mesh, body)


@clean(exchanged(64, "data"), exchanged(64, "data"))
def gradient_through_all_to_all(mesh):
    def body(x):
        def loss(x):
            return jnp.sin(tx.all_to_all(x, "data", split_dim=1, concat_dim=0)).sum()

        return jax.grad(loss)(x)

    return per_device(mesh, body)


@clean(permuted(64, "data"), permuted(64, "data"), axes=LINE)
def gradient_through_ppermute(mesh):
    """Backward the values go the other way around."""

    def body(x):
        return jax.grad(lambda x: jnp.sin(tx.shift(x, "data")).sum())(x)

    return per_device(mesh, body)


@clean(reduced(64, "data"))
def gradient_through_psum(mesh):
    """The transpose of an invariant sum sends nothing."""

    def body(x):
        return jax.grad(lambda x: jnp.sin(tx.psum(x, "data")).sum())(x)

    return per_device(mesh, body)


@clean(reduced(64, "data"), axes=LINE)
def gradient_through_vary(mesh):
    """The transpose of a cast to varying is a sum, with the cast's tag."""

    def body(w, x):
        return jax.grad(lambda w: (tx.vary(w, "data") * jnp.sin(x)).sum())(w)

    args = shape(mesh, P(), 16), shape(mesh, P("data"), 8, 16)
    return on(mesh, (P(), P("data")), P())(body), args


@clean(reduced(64, "data", trips=3), reduced(64, "data"), axes=LINE)
def accumulation_in_a_scan(mesh):
    def body(w, xs):
        def step(total, x):
            loss, grad = jax.value_and_grad(lambda w: jnp.sin(x * w).sum())(vary(w, "data"))
            return total + grad, tx.psum(loss * x, "data")

        grads, losses = lax.scan(step, vary(jnp.zeros(16), "data"), xs[0])
        return tx.pmean(grads, "data"), losses

    args = shape(mesh, P(), 16), shape(mesh, P("data"), 8, 3, 16)
    return on(mesh, (P(), P("data")), P())(body), args


@clean(reduced(64, "data"), reduced(64, "data"))
def forward_mode(mesh):
    """A jvp sends the value and its tangent."""

    def body(x):
        out, tangent = jax.jvp(lambda x: tx.vary(tx.psum(x, "data"), AXES), (x,), (jnp.sin(x),))
        return out * tangent

    return per_device(mesh, body)


# --- calls: jit, nested shard_map, vmap, kernels, callbacks ---


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


@clean(
    *[scattered(64, "data"), gathered(2 * 32, "data"), reduced(64, "data")],
    elsewhere={"tpu": (reduced(64, "data"), reduced(64, "data"), reduced(64, "data"))},
    exact=False,
)
def gradients_without_varying_types(mesh):
    """With check_vma=False, where jax does not know what varies."""

    def body(x):
        def loss(x):
            part = lax.psum_scatter(x, "data", scatter_dimension=1, tiled=True)
            return (part * lax.stop_gradient(part)).sum()

        return jax.grad(loss)(x) * vary(lax.psum(x, "data"), *AXES)

    return per_device(mesh, body, check_vma=False)


@clean()
def nothing_is_sent(mesh):
    """Sizes, indices and sums of Python numbers are known on each device."""

    def body(x):
        return x * lax.psum(1, "data") + lax.axis_index("model") * lax.axis_size("pipe")

    return per_device(mesh, body)


@clean(*[reduced(64 * (i + 1), "data") for i in range(12)], axes=LINE)
def tree_of_twelve_shapes(mesh):
    def body(x):
        tree = {f"layer{i}": jnp.sin(jnp.tile(x, (i + 1, 1)) * (i + 1)) for i in range(12)}
        return tx.psum(tree, "data")

    return on(mesh, P("data"), P())(body), (shape(mesh, P("data"), 8, 16),)


@clean(exchanged(16, "data", dtype="int8"), permuted(16, "model", dtype="int8"))
def bytes_on_the_move(mesh):
    def body(x):
        x = lax.all_to_all(x, "data", 1, 0, tiled=True).reshape(1, 16)
        return lax.ppermute(x * jnp.int8(3), "model", ring(2))

    return per_device(mesh, body, jnp.int8)


@clean(exchanged(32, "data", dtype="bfloat16"), permuted(32, "model", dtype="bfloat16"))
def half_precision_on_the_move(mesh):
    def body(x):
        x = lax.all_to_all(x, "data", 1, 0, tiled=True).reshape(1, 16)
        return lax.ppermute(x * jnp.bfloat16(3), "model", ring(2))

    return per_device(mesh, body, jnp.bfloat16)


@clean(gathered(8 * 8, "data", dtype="uint32"), axes=LINE)
def random_keys(mesh):
    """A key is two words of 32 bits."""

    def body(words):
        keys = jax.random.wrap_key_data(words)
        return jax.random.key_data(lax.all_gather(keys, "data", tiled=True))[:1] * 2

    return on(mesh, P("data"), P("data"))(body), (shape(mesh, P("data"), 8, 2, dtype=jnp.uint32),)


# --- what the compiler may leave out or do once ---


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


# --- what people write ---


@clean(reduced(2 * 16 * 4, "model"), axes=GRID)
def tensor_parallel_mlp(mesh):
    """Columns, then rows: one sum of (2, 16) numbers at the end."""

    def body(x, up, down):
        hidden = jax.nn.relu(x @ up)
        return tx.psum(hidden @ down, "model")

    specs = P("data"), P(None, "model"), P("model")
    args = shape(mesh, specs[0], 8, 16), shape(mesh, specs[1], 16, 32)
    return on(mesh, specs, P("data"))(body), (*args, shape(mesh, specs[2], 32, 16))


@clean(
    *[reduced(2 * 16 * 4, "model"), reduced(2 * 16 * 4, "model")],
    *[reduced(16 * 16 * 4, "data"), reduced(16 * 16 * 4, "data"), reduced(4, "data")],
    axes=GRID,
)
def tensor_parallel_mlp_training(mesh):
    """Backward the input's gradient is summed along model, the weights' along data."""

    def step(x, before, up, down):
        def loss(before, up, down):
            inputs = tx.vary(x * before, "model")
            out = tx.psum(jnp.sin(inputs @ up) @ down, "model")
            return jnp.sin(out).sum()

        weights = before, tx.vary(up, "data"), tx.vary(down, "data")
        value, grads = jax.value_and_grad(loss, argnums=(0, 1, 2))(*weights)
        return tx.psum(value, "data"), grads[0], tx.psum(grads[1:], "data")

    specs = P("data"), P("data"), P(None, "model"), P("model")
    shapes = (8, 16), (8, 16), (16, 32), (32, 16)
    args = tuple(shape(mesh, s, *dims) for s, dims in zip(specs, shapes, strict=True))
    outs = P(), P("data"), (P(None, "model"), P("model"))
    return on(mesh, specs, outs)(step), args


@clean(permuted(64, "pipe", trips=6), axes={"pipe": 8})
def pipeline_of_ppermutes(mesh):
    def body(w, x):
        def tick(carry, x):
            stage = lax.axis_index("pipe")
            value = jnp.where(stage == 0, x, carry)
            out = jnp.tanh(value * w[0])
            return tx.shift(out, "pipe", wrap=False), out

        return lax.scan(tick, vary(jnp.zeros(16), "pipe"), vary(x, "pipe"))[1][None]

    args = shape(mesh, P("pipe"), 8, 16), shape(mesh, P(), 6, 16)
    return on(mesh, (P("pipe"), P()), P("pipe"))(body), args


@clean(permuted(2 * 64, "data", trips=8), axes=LINE)
def ring_attention(mesh):
    """Keys and values go around the ring together; the last turn brings them home."""

    def body(q, k, v):
        def turn(carry, _):
            out, norm, kv = carry
            k, v = kv
            weight = jnp.exp(q @ k.T)
            kv = tx.shift(jnp.concatenate([k, v]), "data")
            return (out + weight @ v, norm + weight.sum(1), (kv[:1], kv[1:])), None

        start = jnp.zeros_like(q), jnp.zeros_like(q[:, 0]), (k, v)
        (out, norm, _), _ = lax.scan(turn, start, None, length=8)
        return out / norm[:, None]

    return per_device(mesh, body, jnp.float32, jnp.float32, jnp.float32)


@clean(
    *[gathered(8 * 64, "data"), scattered(8 * 64, "data"), reduced(4, "data")],
    elsewhere={"tpu": (gathered(8 * 64, "data"), reduced(8 * 64, "data"), reduced(4, "data"))},
    axes=LINE,
)
def zero_step(mesh):
    """Weights in shards: gathered for use, their gradient scattered."""

    def body(w, x):
        def loss(w):
            return jnp.sin(x * tx.all_gather(w, "data")).sum()

        value, grad = jax.value_and_grad(loss)(w)
        return w - 0.1 * grad, tx.psum(value, "data")

    args = shape(mesh, P("data"), 8, 16), shape(mesh, P("data"), 8, 16)
    return on(mesh, (P("data"), P("data")), (P("data"), P()))(body), args


@clean(
    *[scattered(8 * 64, "data"), gathered(8 * 64, "data")],
    elsewhere={"tpu": (reduced(8 * 64, "data"), gathered(8 * 64, "data"))},
    axes=LINE,
)
def zero_one_update(mesh):
    """Whole weights: the gradient is scattered, the update of each shard gathered."""

    def body(w, x):
        grad = jax.grad(lambda w: jnp.sin(x * w).sum())(vary(w, "data"))
        mine = tx.reduce_scatter(grad, "data", mean=True)
        return w - tx.all_gather(0.1 * mine, "data", invariant=True)

    args = shape(mesh, P(), 8, 16), shape(mesh, P("data"), 8, 16)
    return on(mesh, (P(), P("data")), P())(body), args


@clean(exchanged(8 * 4 * 4, "data"), exchanged(8 * 4 * 4, "data"), axes=LINE)
def mixture_of_experts(mesh):
    """Tokens go to the device of their expert and come back."""

    def body(tokens, expert):
        sent = tx.all_to_all(tokens[0], "data", split_dim=0, concat_dim=0)
        return tx.all_to_all(jnp.tanh(sent @ expert[0]), "data", split_dim=0, concat_dim=0)[None]

    args = shape(mesh, P("data"), 8, 8, 4), shape(mesh, P("data"), 8, 4, 4)
    return on(mesh, (P("data"), P("data")), P("data"))(body), args


@clean(exchanged(2 * 4 * 8 * 4, "model"), exchanged(2 * 4 * 8 * 4, "model"), axes=GRID)
def ulysses_attention(mesh):
    """From a shard of the sequence to a shard of the heads, and back."""

    def body(x):  # on one device (2 batch, 4 sequence, 2 heads, 4 features)
        heads = tx.all_to_all(x, "model", split_dim=2, concat_dim=1)
        mixed = jnp.einsum("bshf,bthf->bsht", heads, heads)
        out = jnp.einsum("bsht,bthf->bshf", jax.nn.softmax(mixed), heads)
        return tx.all_to_all(out, "model", split_dim=1, concat_dim=2)

    spec = P("data", "model")
    return on(mesh, spec, spec)(body), (shape(mesh, spec, 8, 8, 2, 4),)


@clean(reduced(2 * 16 * 4, "data"), axes=LINE)
def synchronised_batch_statistics(mesh):
    """Mean and variance in one sum."""

    def body(x):
        total, squares = tx.pmean(jnp.stack([x[0], x[0] ** 2]), "data")
        return (x - total) * lax.rsqrt(squares - total**2 + 1e-5)

    return per_device(mesh, body)
