"""Programs in which communication gets in unasked. The line that causes it is marked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from audit_cases import P, on, shape
from corpus.corpus_programs import Program
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding


@dataclass(frozen=True)
class Added(Program):
    """A program with communication that is not in it.

    origin: the class that it has to get.
    eager: written to run operation by operation, without jit.
    only_when_run: its communication is in no compiled program; only the gate can see it.
    """

    origin: str = "partitioner"
    eager: bool = False
    only_when_run: bool = False


ADDED: dict[str, Added] = {}
# What wanted the data is in the module right after partitioning, which only an audit has.
UNNAMED = {"gate": "XLA gives what it inserts at a result neither name nor line"}
RENAMED = {"gate": "since jax 0.11 XLA names it after the operand, not after what wanted it"}
GRID = {"data": 4, "model": 2}


def added(origin: str = "partitioner", *, axes: Mapping[str, int] = GRID, **more: Any):
    def register(build):
        ADDED[build.__name__] = Added(build, axes, origin=origin, **more)
        return build

    return register


@added()
def matmul_over_a_sharded_dim(mesh):
    def fn(x, w):
        return x @ w  # <-- here

    return fn, (shape(mesh, P(None, "data"), 8, 8), shape(mesh, P("data"), 8, 8))


@added()
def matmul_with_sharded_weights(mesh):
    """What is called FSDP: the partitioner gathers the weights."""

    def fn(x, w):
        return jnp.tanh(x * 2) @ jnp.tanh(w)  # <-- here

    return fn, (shape(mesh, P("data"), 256, 8), shape(mesh, P("data"), 8, 8))


@added()
def two_layers(mesh):
    def fn(x, a, b):
        hidden = jax.nn.relu(x @ a)
        return hidden @ b  # <-- here

    specs = P("data"), P(None, "model"), P("model")
    return fn, tuple(shape(mesh, spec, 8, 8) for spec in specs)


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


@added("boundary", limits=RENAMED)
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


@added("boundary", limits=RENAMED)
def between_two_shard_maps(mesh):
    def fn(x):
        y = on(mesh, P("data"), P("data"))(jnp.sin)(x)
        return on(mesh, P("model"), P("model"))(jnp.cos)(y)  # <-- here

    return fn, (shape(mesh, P("data"), 8, 8),)


@added()
def partial_auto_matmul(mesh):
    """An explicit shard_map over one axis leaves the other to the partitioner."""

    def fn(x, w):
        return on(mesh, (P("data"), P()), P("data"), axis_names={"data"})(
            lambda x, w: x @ w  # <-- here
        )(x, w)

    return fn, (shape(mesh, P("data", "model"), 8, 8), shape(mesh, P("model"), 8, 8))


@added()
def partial_auto_sum(mesh):
    def fn(x):
        def body(x):
            return jnp.sin(x).sum(1)  # <-- here

        return on(mesh, P("data"), P("data"), axis_names={"data"})(body)(x)

    return fn, (shape(mesh, P("data", "model"), 8, 8),)


@added()
def at_set(mesh):
    def fn(x, i):
        return x.at[i].set(1.0)  # <-- here

    return fn, (shape(mesh, P(), 64), shape(mesh, P("data"), 8, dtype=jnp.int32))


@added()
def at_add(mesh):
    def fn(x, i, v):
        return x.at[i].add(v)  # <-- here

    args = shape(mesh, P(), 64), shape(mesh, P("data"), 8, dtype=jnp.int32)
    return fn, (*args, shape(mesh, P("data"), 8))


@added()
def sort(mesh):
    def fn(x):
        return jnp.sort(x * 2)  # <-- here

    return fn, (shape(mesh, P("data"), 64),)


@added()
def argsort(mesh):
    def fn(x):
        return jnp.argsort(jnp.sin(x))  # <-- here

    return fn, (shape(mesh, P("data"), 64),)


@added()
def top_k(mesh):
    def fn(x):
        return lax.top_k(x * 2, 3)[0]  # <-- here

    return fn, (shape(mesh, P("data"), 64),)


@added()
def gather(mesh):
    def fn(x, i):
        return x[i]  # <-- here

    return fn, (shape(mesh, P("data"), 64), shape(mesh, P(), 2, dtype=jnp.int32))


@added()
def embedding_table(mesh):
    def fn(table, ids):
        return jnp.take(table, ids, axis=0)  # <-- here

    return fn, (shape(mesh, P("model"), 64, 8), shape(mesh, P("data"), 8, dtype=jnp.int32))


@added()
def cumsum(mesh):
    def fn(x):
        return jnp.cumsum(x * 2)  # <-- here

    return fn, (shape(mesh, P("data"), 64),)


@added()
def convolution_halo(mesh):
    def fn(x, w):
        return lax.conv_general_dilated(  # <-- here
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    return fn, (shape(mesh, P(None, "data"), 1, 16, 4, 1), shape(mesh, P(), 3, 3, 1, 1))


@added()
def convolution_over_sharded_channels(mesh):
    def fn(x, w):
        return lax.conv_general_dilated(  # <-- here
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    args = shape(mesh, P(None, None, None, "model"), 2, 4, 4, 4)
    return fn, (args, shape(mesh, P(None, None, "model"), 3, 3, 4, 4))


@added()
def random_permutation(mesh):
    def fn(x, key):
        return jax.random.permutation(jax.random.wrap_key_data(key), x)  # <-- here

    return fn, (shape(mesh, P("data"), 64), shape(mesh, P(), 2, dtype=jnp.uint32))


@added()
def random_choice(mesh):
    def fn(x, key):
        return jax.random.choice(jax.random.wrap_key_data(key), x, (4,))  # <-- here

    return fn, (shape(mesh, P("data"), 64), shape(mesh, P(), 2, dtype=jnp.uint32))


@added()
def random_bits_of_the_device(mesh):
    """The generator of the hardware makes the whole array somewhere."""

    def fn(key, x):
        key = jax.random.wrap_key_data(key, impl="rbg")
        return jax.random.uniform(key, x.shape) @ x  # <-- here

    return fn, (shape(mesh, P(), 4, dtype=jnp.uint32), shape(mesh, P("data"), 8, 8))


@added()
def reshape_over_a_sharded_dim(mesh):
    def fn(x):
        return jnp.sin(x).reshape(2, 32) * 2  # <-- here

    return fn, (shape(mesh, P("data"), 4, 16),)


@added()
def flatten_of_a_sharded_inner_dim(mesh):
    def fn(x):
        return jnp.sin(x).reshape(64) * 2  # <-- here

    return fn, (shape(mesh, P(None, "data"), 8, 8),)


@added()
def scan_over_a_sharded_dim(mesh):
    """Gathered before the loop; on TPU and GPU the compiler moves it to where a row is used."""

    def fn(x):
        def step(carry, row):
            return carry + jnp.sin(row), None  # <-- here

        return lax.scan(step, jnp.zeros(8), x)[0]  # <-- here

    return fn, (shape(mesh, P("data"), 8, 8),)


@added()
def matmul_inside_a_scan(mesh):
    def fn(x, w):
        def step(carry, _):
            return jnp.tanh(carry @ w), None  # <-- here

        return lax.scan(step, x, None, length=5)[0]

    return fn, (shape(mesh, P("data"), 8, 8), shape(mesh, P("model"), 8, 8))


@added()
def loop_until_a_sharded_norm_is_small(mesh):
    def fn(x):
        def is_large(x):
            return jnp.sum(x * x) > 1.0  # <-- here

        return lax.while_loop(is_large, lambda x: x * 0.5, x)

    return fn, (shape(mesh, P("data"), 64),)


@added()
def dynamic_slice(mesh):
    def fn(x, i):
        return lax.dynamic_slice(x, (i[0],), (4,))  # <-- here

    return fn, (shape(mesh, P("data"), 64), shape(mesh, P(), 1, dtype=jnp.int32))


@added()
def differences(mesh):
    def fn(x):
        return x[1:] - x[:-1]  # <-- here

    return fn, (shape(mesh, P("data"), 64),)


@added()
def roll(mesh):
    def fn(x):
        return jnp.roll(x, 1)  # <-- here

    return fn, (shape(mesh, P("data"), 64),)


@added()
def flip(mesh):
    def fn(x):
        return jnp.flip(x) * 2  # <-- here

    return fn, (shape(mesh, P("data"), 64),)


@added()
def concatenate(mesh):
    def fn(x, y):
        return jnp.concatenate([x, y]) * 2  # <-- here

    return fn, (shape(mesh, P("data"), 8), shape(mesh, P("data"), 16))


@added()
def fft(mesh):
    def fn(x):
        return jnp.abs(jnp.fft.fft(jnp.sin(x)))  # <-- here

    return fn, (shape(mesh, P("data"), 64),)


@added()
def mean_of_a_batch(mesh):
    def fn(x):
        return x.mean()  # <-- here

    return fn, (shape(mesh, P("data"), 64),)


@added()
def argmax(mesh):
    def fn(x):
        return jnp.argmax(x, axis=1)  # <-- here

    return fn, (shape(mesh, P(None, "data"), 8, 64),)


@added()
def softmax_over_a_sharded_dim(mesh):
    def fn(x):
        return jax.nn.softmax(x)  # <-- here

    return fn, (shape(mesh, P(None, "model"), 8, 8),)


@added()
def sum_of_two_shardings(mesh):
    def fn(x, y):
        return jnp.sin(x) + jnp.cos(y)  # <-- here

    return fn, (shape(mesh, P("data"), 8, 8), shape(mesh, P(None, "data"), 8, 8))


@added()
def gradient_of_replicated_weights(mesh):
    def fn(w, x):
        def loss(w):
            return (jnp.sin(x @ w)).sum()  # <-- here

        return jax.grad(loss)(w)

    return fn, (shape(mesh, P(), 4, 4), shape(mesh, P("data"), 8, 4))


@added(platforms=("cpu", "tpu"))
def callback_of_a_sharded_array(mesh):
    def fn(x):
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda x: x, out, jnp.sin(x)) * 2  # <-- here

    return fn, (shape(mesh, P("data"), 64),)


@added()
def beside_a_declared_psum(mesh):
    def fn(x):
        total = on(mesh, P("data"), P())(lambda x: lax.psum(x, "data"))(x)
        return total + jnp.sin(x).max(0)  # <-- here

    return fn, (shape(mesh, P("data"), 8, 8),)


@added(eager=True)
def eager_matmul(mesh):
    def fn(x, w):
        return x @ w  # <-- here

    return fn, (shape(mesh, P(None, "data"), 8, 8), shape(mesh, P("data"), 8, 8))


@added(eager=True)
def eager_sum_of_two_shardings(mesh):
    def fn(x, y):
        return x + y  # <-- here

    return fn, (shape(mesh, P("data"), 8, 8), shape(mesh, P(None, "data"), 8, 8))


@added("reshard", eager=True, only_when_run=True)
def device_put(mesh):
    def fn(x):
        return jax.device_put(x, NamedSharding(mesh, P()))  # <-- here

    return fn, (shape(mesh, P("data"), 8, 8),)


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


@added("reshard", limits=RENAMED)
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
