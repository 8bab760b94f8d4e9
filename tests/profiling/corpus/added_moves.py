"""Operations along a sharded dim: indexing, sorting, reshaping, shifting, random numbers."""

import jax
import jax.numpy as jnp
from audit_cases import P, shape
from corpus.corpus_marks import added
from jax import lax


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
def argmax(mesh):
    def fn(x):
        return jnp.argmax(x, axis=1)  # <-- here

    return fn, (shape(mesh, P(None, "data"), 8, 64),)
