"""What sends in two steps: the starts of jax 0.12's collectives, and sends with their receipts."""

import jax
import jax.numpy as jnp
from corpus.corpus_moves import (
    LINE,
    clean,
    exchanged,
    gathered,
    per_device,
    permuted,
    reduced,
    ring,
    scattered,
)
from jax import lax
from jax._src.lax import parallel  # where jax 0.12 keeps all but psum_scatter_start

if hasattr(lax, "psum_scatter_start"):

    @clean(reduced(64, "X"), axes={"X": 8})
    def psum_start(mesh):
        def body(x):
            under_way = parallel.psum_start(x, "X")
            return jnp.sin(x) + under_way.done()

        return per_device(mesh, body)

    @clean(gathered(8 * 64, "X"), axes={"X": 8})
    def all_gather_start(mesh):
        def body(x):
            under_way = parallel.all_gather_start(x, "X", tiled=True)
            return jnp.sin(x) + under_way.done().sum(0)

        return per_device(mesh, body)

    @clean(scattered(64, "X"), axes={"X": 8}, platforms=("cpu",))  # XLA elsewhere refuses the shape
    def psum_scatter_start(mesh):
        def body(x):
            under_way = lax.psum_scatter_start(x, "X", scatter_dimension=1, tiled=True)
            return jnp.tile(under_way.done(), 8) + jnp.sin(x)

        return per_device(mesh, body)

    @clean(exchanged(64, "X"), axes={"X": 8}, platforms=("cpu",))  # as above
    def all_to_all_start(mesh):
        def body(x):
            under_way = parallel.all_to_all_start(x, "X", 1, 1, tiled=True)
            return jnp.sin(x) + under_way.done()

        return per_device(mesh, body)

    @clean(permuted(64, "X"), axes={"X": 8})
    def ppermute_start(mesh):
        def body(x):
            under_way = parallel.ppermute_start(x, "X", ring(8))
            return jnp.sin(x) + under_way.done()

        return per_device(mesh, body)


@clean(permuted(64, "data"), axes=LINE, platforms=("cuda",))
def psend_and_precv(mesh):
    """One send, to the next device; the receipt sends nothing."""

    def body(x):
        sent = parallel.psend(x, "data", [(0, 1)])
        return parallel.precv(sent, jax.ShapeDtypeStruct(x.shape, x.dtype), "data", [(0, 1)])

    return per_device(mesh, body, check_vma=False)
