"""Every collective of jax.lax, once."""

import jax.numpy as jnp
from audit_cases import P, on, vary
from corpus.corpus_moves import (
    AXES,
    GRID,
    LINE,
    Moves,
    clean,
    exchanged,
    gathered,
    per_device,
    permuted,
    reduced,
    ring,
    rows,
    scattered,
)
from jax import lax


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
