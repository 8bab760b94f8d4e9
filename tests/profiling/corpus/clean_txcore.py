"""Every collective of txcore, once."""

import jax.numpy as jnp
from audit_cases import P, on, shape
from corpus.corpus_moves import (
    AXES,
    LINE,
    clean,
    exchanged,
    gathered,
    per_device,
    permuted,
    reduced,
    rows,
    scattered,
)

import txcore as tx


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
