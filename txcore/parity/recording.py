"""Record activations by name, inside of anything that jax traces."""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from txcore import _compat


@dataclass(frozen=True)
class Call:
    """Hold what one device recorded once.

    Attributes:
      name: given by the user.
      rank: of the name, among those of the traced program.
      site: the place among all places of the traced program that record, in order.
      spec: how the value's dims are split.
      sizes: of the mesh's axes.
      place: the device's index along each axis.
      value: float64, with the examples in dim 0.
    """

    name: str
    rank: int
    site: int
    spec: P
    sizes: Mapping[str, int]
    place: Mapping[str, int]
    value: np.ndarray


@dataclass
class Recording:
    """Hold what a run recorded.

    Attributes:
      calls: as they came.
      sites: the names at all places that record, in the order in which they were traced.
    """

    calls: list[Call] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The names that were recorded, in the order of the traced program."""
        ranks: dict[str, int] = {}
        for call in self.calls:
            ranks.setdefault(call.name, call.rank)
        return sorted(ranks, key=ranks.__getitem__)

    def take(self) -> "Recording":
        """Return what was recorded so far, and begin anew with the same program."""
        taken = Recording(self.calls.copy())
        self.calls.clear()
        return taken


# The innermost is recorded: a program that was compiled while recording may run in a later one.
_active: list[Recording] = []


@functools.cache
def _make_context() -> Any:
    """Return what lets jax trace anew what it has traced without recording.

    It is made when it is first entered, since making it lets jax forget all that it has traced.
    """
    return jax.make_user_context(None)


@contextlib.contextmanager
def recording() -> Iterator[Recording]:
    """Record what is traced and run in this context; a program compiled before records nothing.

    What a program records is there when its results are.
    """
    made = Recording()
    _active.append(made)
    try:
        with _make_context()(True):
            yield made
    finally:
        _active.remove(made)


def record(x: Any, name: str, spec: P | None = None) -> Any:
    """Name an activation, for the parity kit to say where two runs part.

    It returns `x`. Nothing is in the program but when `tx.testing.assert_plans_agree` or
    `assert_runs_agree` has found a difference and runs it once more to find the first operation at
    which there is one. It may stand inside of `shard_map`, of a step, of a layer in a scan, a
    pipeline's stage, `jax.checkpoint`, `jax.vmap` and whatever is differentiated.

    Values are compared example by example: which device has an example, in which microbatch, and in
    which stage a layer is, make no difference. A value that a device makes of all of its examples,
    such as a local mean, differs with their number: reduce it first, or record what it is made of.

    Args:
      x: array (or pytree of arrays) with the examples in dim 0.
      name: of the operation; layers may share it.
      spec: which dims are split, over which mesh axes, as `P(None, None, "model")`; dim 0 needs no
        axis. None: no dim but that of the examples. Axes that are not bound do not count.

    Returns:
      `x` itself.

    Raises:
      TypeError: `name` is no string, or `spec` no PartitionSpec.
      ValueError: a value has no dim of examples, or fewer dims than `spec`.

    Example:
      >>> def f(x, w):
      ...     h = tx.testing.record(jax.numpy.tanh(x @ w), "hidden", P(None, "model"))
      ...     return tx.psum(h.sum(1), "model")
      >>> x, w = np.ones((2, 3), np.float32), np.ones((3, 4), np.float32)
      >>> tx.testing.run_sharded(f, x, w, axes={"model": 2}, in_specs=(P(), P(None, "model")),
      ...                        out_specs=P()).round(2)
      array([3.98, 3.98], dtype=float32)
    """
    if not _active:
        return x
    if not isinstance(name, str) or not (spec is None or isinstance(spec, P)):
        raise TypeError(
            "tx.testing.record needs (x, name, spec), a name and a PartitionSpec or None, got "
            f"{name!r} and {spec!r}"
        )
    split = P() if spec is None else spec
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _record_leaf(path, leaf, name, split), x
    )


def _record_leaf(path: Any, leaf: Any, name: str, spec: P) -> Any:
    if _compat.is_key_array(leaf):
        data = _record_leaf(path, jax.random.key_data(leaf), name, spec)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    name += jax.tree_util.keystr(path)
    leaf = jnp.asarray(leaf)
    if leaf.ndim + _compat.is_vmapped(leaf) < max(1, len(spec)):
        raise ValueError(
            f"tx.testing.record needs {name!r} with the examples in dim 0 and a dim for each entry "
            f"of {spec}, got shape {leaf.shape}: record what each example has"
        )
    axes = _compat.bound_axes()
    sizes = {axis: _compat.axis_size(axis) or 1 for axis in axes}
    sites = _active[-1].sites
    sites.append(name)
    rank, site = sites.index(name), len(sites)

    def keep(batch_dims: int, value: np.ndarray, place: Mapping[str, int]) -> None:
        where = {axis: place.get(axis, 0) for axis in axes}
        # A copy, since the runtime's memory is lent; dims of vmap are examples too.
        host = np.array(value, np.float64)
        host = host.reshape(-1, *host.shape[max(1, batch_dims) :])
        if _active:
            _active[-1].calls.append(Call(name, rank, site, spec, sizes, where, host))

    return _make_primitive()[0].bind(leaf, keep=keep, batch_dims=0)


@functools.cache
def _make_primitive() -> tuple[Any]:
    """Make the identity whose compiled form calls Python with its operands' values.

    It has no effect in jax's sense, so that it may stand wherever an array may. jax.debug.callback
    puts what it is called with on a device once more, and waits for ever where the devices' threads
    are all in callbacks (jax 0.10).
    """
    from jax.extend.core import Primitive
    from jax.extend.mlir.dialects import stablehlo
    from jax.interpreters import ad, batching, mlir

    primitive = Primitive("txcore_record")

    def batch(args: Any, dims: Any, *, batch_dims: int, **params: Any) -> Any:
        x = jnp.moveaxis(args[0], dims[0], 0)
        return primitive.bind(x, batch_dims=batch_dims + 1, **params), 0

    def differentiate(primals: Any, tangents: Any, **params: Any) -> Any:
        return primitive.bind(*primals, **params), tangents[0]

    def lower(ctx: Any, x: Any, *, keep: Any, batch_dims: int) -> Any:
        # The device is found here: as an operand its index would make what is recorded look as if
        # it differed along all axes.
        mesh = getattr(ctx.module_context.axis_context, "mesh", None)
        sizes = {} if mesh is None else dict(mesh.shape)
        operands, avals = [x], list(ctx.avals_in)
        if math.prod(sizes.values()) > 1:
            operands.append(stablehlo.partition_id())
            avals.append(jax.core.ShapedArray((), np.dtype(np.uint32)))

        def call(value: Any, device: Any = 0) -> tuple[()]:
            index = np.unravel_index(int(device), tuple(sizes.values())) if sizes else ()
            place = {axis: int(i) for axis, i in zip(sizes, index, strict=True)}
            keep(batch_dims, np.asarray(value), place)
            return ()

        _, _, keepalive = mlir.emit_python_callback(
            *(ctx.replace(avals_in=avals, avals_out=[]), call, None, operands, avals, []),
            has_side_effect=True,
            returns_token=False,
        )
        if keepalive is not None:
            ctx.module_context.add_keepalive(keepalive)
        return [x]

    primitive.def_impl(lambda *args, **params: jax.jit(partial(primitive.bind, **params))(*args))
    primitive.def_abstract_eval(lambda x, *_, **__: x)
    batching.primitive_batchers[primitive] = batch
    ad.primitive_jvps[primitive] = differentiate
    mlir.register_lowering(primitive, lower, cacheable=False)
    return (primitive,)
