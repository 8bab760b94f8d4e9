"""The collectives, meshes and axes that every test goes through."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore.parallel.gradients.algorithms import ALGORITHMS, mean_blocks, mean_flat


@dataclass(frozen=True, eq=False)
class Case:
    op: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    args: tuple[Any, ...] = ()
    oracle_kwargs: dict[str, Any] | None = None
    linear: bool = True
    algorithm: Any = None  # the name of that by which a mean is taken, of floats

    def __str__(self):
        parts = [self.op, *(f"{k}{v}" for k, v in self.kwargs.items()), self.algorithm or ""]
        return "-".join(filter(None, parts)).replace(" ", "")

    def fits(self, dtype, devices):
        if self.algorithm is None:
            return True
        return "float" in dtype and (
            self.algorithm != "recursive_doubling" or devices.bit_count() == 1
        )

    @property
    def averages(self):
        return self.op == "pmean" or bool(self.kwargs.get("mean"))

    @property
    def sums(self):
        return self.op in ("psum", "reduce_scatter", "psum_scatter")

    @property
    def invariant(self):
        """Whether the result is equal on every device by its type."""
        equal = ("psum", "pmean", "pmax", "pmin", "broadcast")
        return self.op in equal or bool(self.kwargs.get("invariant"))

    @property
    def divides(self):
        """The dim of the shard that is split, if one is."""
        if self.op in ("reduce_scatter", "psum_scatter", "all_to_all"):
            return self.kwargs.get("split_dim", self.kwargs.get("dim", 0))
        return None

    def call(self, x, axis):
        if self.algorithm is not None:
            return jax.tree.map(lambda leaf: self._average(leaf, axis), x)
        return getattr(tx, self.op)(x, axis, *self.args, **self.kwargs)

    def _average(self, x, axis):
        axes = tuple(a for a in as_tuple(axis) if tx.axis_size(a) > 1)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return tx.pmean(x, axes)
        algorithm = ALGORITHMS[self.algorithm]
        if self.op == "pmean":
            return mean_flat(algorithm, x.ravel(), axes, "x").reshape(x.shape)
        n = tx.axis_size(axes)
        mean = mean_blocks(algorithm, x.reshape(n, -1), axes, "x")
        return mean.reshape(-1, *x.shape[1:])

    def expect(self, shards, sizes, axes):
        kwargs = self.kwargs if self.oracle_kwargs is None else self.oracle_kwargs
        args = [list(a) for a in self.args]
        fn = getattr(oracle, self.op)
        return oracle.per_group(lambda g: fn(g, *args, **kwargs), shards, sizes, axes)


CASES = [
    Case("psum"),
    Case("pmean"),
    Case("pmax", linear=False),
    Case("pmin", linear=False),
    Case("all_gather"),
    Case("all_gather", {"dim": -1}),
    Case("all_gather", {"dim": 1, "invariant": True}, oracle_kwargs={"dim": 1}),
    Case("reduce_scatter"),
    Case("reduce_scatter", {"dim": 1, "mean": True}),
    Case("psum_scatter", {"dim": 1}),
    Case("all_to_all", {"split_dim": 0, "concat_dim": 1}),
    Case("all_to_all", {"split_dim": 1, "concat_dim": 1}),
    Case("ppermute", args=(((0, 1), (1, 0)),)),
    Case("ppermute", args=(((1, 0),),)),
    Case("shift"),
    Case("shift", {"by": -2}),
    Case("shift", {"by": 1, "wrap": False}),
    Case("broadcast"),
    Case("broadcast", {"root": 1}),
    Case("vary"),
    Case("pvary"),
]
BY_ALGORITHMS = [
    case
    for name in ALGORITHMS
    for case in (
        Case("pmean", algorithm=name),
        Case("reduce_scatter", {"mean": True}, algorithm=name),
    )
]
oracle.psum_scatter = oracle.reduce_scatter
oracle.pvary = oracle.vary

LOCAL = (8, 8)


def as_tuple(axis):
    return axis if isinstance(axis, tuple) else (axis,)


def world(sizes):
    return int(np.prod(list(sizes.values())))


def sharded(f, sizes, *, check_vma=True, jit=True):
    """Return `f` of one shard as a function of all shards [world, *local]."""
    names = tuple(sizes)
    devices = np.array(jax.devices()[: world(sizes)]).reshape(tuple(sizes.values()))
    mesh = Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))
    mapped = jax.shard_map(
        lambda x: jax.tree.map(lambda y: y[None], f(jax.tree.map(lambda v: v[0], x))),
        mesh=mesh,
        in_specs=P(names),
        out_specs=P(names),
        check_vma=check_vma,
    )
    return jax.jit(mapped) if jit else mapped


def shards(sizes, local=LOCAL, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(-8, 8, (world(sizes), *local)).astype(dtype)
