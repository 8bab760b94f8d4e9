"""Muon: momentum whose step is an orthogonal matrix; it needs each matrix whole."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from txcore.collectives import all_gather, all_to_all, axis_index, axis_size
from txcore.kernels.common import checks
from txcore.layout import Split, axes_of, entry_axes, shape_of_part
from txcore.optim import optimizer
from txcore.optim.schedules import Schedule, as_schedule
from txcore.printing import format_call
from txcore.step_scope import current_scope, specs_like
from txcore.trees import Grads, OptState, Params, PyTree

# Of the quintic whose iteration brings singular values near 1, steepest at 0.
_QUINTIC = (3.4445, -4.7750, 2.0315)


def muon(
    learning_rate: float | Schedule,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    iterations: int = 5,
    weight_decay: float = 0.0,
) -> optimizer.Optimizer:
    """Make Muon, for the hidden matrices of a network; give what is no matrix to another optimizer.

    Equations, for a gradient G and the velocity V of a matrix of shape (inputs, outputs):
    `V = momentum V + G`; `U = G + momentum V` (or V without `nesterov`); O is U with its singular
    values brought near 1, by Newton-Schulz iterations; `W = (1 - rate decay) W - rate
    sqrt(max(1, outputs / inputs)) O`. An array of more dims is a stack of matrices, as the layers
    of a pipeline are.

    O needs the whole of U. Where the state is sharded over the devices (`DP(shard=)`), V stays in
    parts, and matrices are dealt out to the devices as to owners by an all-to-all for each shape,
    each then orthogonalized by one device alone, and dealt back. What a shape has more than the
    devices share evenly goes to those with the least to compute. A matrix that is the only one, or
    is split over several dims, is gathered on every device, as is a stack.

    Args:
      learning_rate: at least 0, or a schedule: step -> float32 scalar.
      momentum: in [0, 1).
      nesterov: whether to look ahead along the velocity.
      iterations: of Newton-Schulz, at least 1.
      weight_decay: decoupled, times the learning rate; at least 0.

    Returns:
      The optimizer. Its state is {"velocity": ...}, float32 or wider.

    Raises:
      TypeError: `learning_rate` is neither a number nor a schedule.
      ValueError: a number is out of its range. From `init`: a parameter is no matrix. In a step:
        the layers of a pipeline are no stacks of matrices.

    Example:
      >>> import txcore as tx
      >>> optimizer = tx.optim.groups({
      ...     "embed": tx.optim.adamw(3e-4), "*/w": tx.optim.muon(0.02), "*": tx.optim.adamw(3e-4)})

    References:
      Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    rate = as_schedule("muon", "learning_rate", learning_rate)
    checks.require_in_range("muon", "momentum", momentum, 0, 1)
    checks.require_in_range("muon", "weight_decay", weight_decay, 0, float("inf"))
    if checks.whole_number(iterations) is None or iterations < 1:
        raise ValueError(f"muon: iterations must be a whole number from 1 on; got {iterations!r}.")

    def init(params: Params) -> OptState:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if jnp.ndim(leaf) < 2:
                raise ValueError(
                    f"muon: every parameter must be a matrix, or a stack of them; params"
                    f"{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}. Give what is none "
                    "to another optimizer: tx.optim.groups({'*/w': tx.optim.muon(0.02), '*': "
                    "tx.optim.adamw(3e-4)})."
                )
        return {"velocity": optimizer.zero_moments("muon", params)}

    def update(
        grads: Grads,
        opt_state: OptState,
        params: Params,
        *,
        step: jax.Array,
        grad_scale: ArrayLike = 1.0,
    ) -> tuple[Params, OptState]:
        optimizer.check_like_params("muon", "gradients", grads, params)
        grads = optimizer.scale_gradients(grads, grad_scale)

        def follow(v: jax.Array, g: jax.Array) -> jax.Array:
            return momentum * v + g.astype(v.dtype)

        _refuse_stacked_vectors(params)
        velocity = jax.tree.map(follow, opt_state["velocity"], grads)
        ahead = jax.tree.map(follow, velocity, grads) if nesterov else velocity
        structure: Any = jax.tree.structure(params)
        specs = specs_like(ahead) or [P()] * structure.num_leaves
        steps = orthogonalize_leaves(jax.tree.leaves(ahead), specs, iterations)

        def move(p: jax.Array, o: jax.Array, spec: P) -> jax.Array:
            inputs, outputs = whole_shape(p.shape, spec)[-2:]
            own = jnp.asarray(rate(step), o.dtype)
            kept = p.astype(o.dtype) * (1 - own * weight_decay)
            return (kept - own * math.sqrt(max(1, outputs / inputs)) * o).astype(p.dtype)

        moved = map(move, jax.tree.leaves(params), steps, specs)
        return jax.tree.unflatten(structure, list(moved)), {"velocity": velocity}

    text = format_call(
        "muon",
        learning_rate,
        momentum=(momentum, 0.95),
        nesterov=(nesterov, True),
        iterations=(iterations, 5),
        weight_decay=(weight_decay, 0.0),
    )
    return optimizer.Optimizer(
        init, update, handles_shards=True, exchanges=predict_exchanges, text=text
    )


def _refuse_stacked_vectors(params: Params) -> None:
    """Refuse vectors of a pipeline's layers, which look like a matrix where they are stacked."""
    scope = current_scope()
    if scope is None or scope.pipeline is None:
        return
    stacked = 1 + (scope.pipeline.chunks > 1)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if getattr(path[0], "key", None) == "blocks" and jnp.ndim(leaf) < stacked + 2:
            raise ValueError(
                f"muon: every parameter must be a matrix; each layer's part of params"
                f"{jax.tree_util.keystr(path)}, stacked in shape {jnp.shape(leaf)}, is none. Give "
                "it to another optimizer: tx.optim.groups({'blocks/w': tx.optim.muon(0.02), '*': "
                "tx.optim.adamw(3e-4)})."
            )


def newton_schulz(x: jax.Array, iterations: int) -> jax.Array:
    """Bring the singular values of matrices near 1.

    Args:
      x: shape (..., rows, columns).
      iterations: at least 1.

    Returns:
      Matrices of the same shape and dtype, with singular values from about 0.7 to 1.2; zeros stay.
    """
    a, b, c = _QUINTIC
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    x = x / (jnp.sqrt(jnp.sum(x * x, (-2, -1), keepdims=True)) + 1e-7)

    def iterate(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        square = x @ jnp.swapaxes(x, -1, -2)
        return a * x + (b * square + c * square @ square) @ x, None

    x = lax.scan(iterate, x, length=iterations)[0]
    return jnp.swapaxes(x, -1, -2) if tall else x


class Deal(NamedTuple):
    """State how matrices of one shape become whole.

    Attributes:
      places: of them among the leaves.
      splits: the dims that are split, with their axes; () where they are whole.
      by_owner: whether each goes to one device by an all-to-all, and not to all by a gather.
      owners: the devices, one for each of the last matrices, that the others do not get as many of.
    """

    places: tuple[int, ...]
    splits: tuple[Split, ...]
    by_owner: bool
    owners: tuple[int, ...] = ()


def deal_out(
    shapes: Sequence[tuple[int, ...]], specs: Sequence[P], sizes: Mapping[str, int]
) -> list[Deal]:
    """Return how matrices become whole: those of one shape, split alike, together.

    Args:
      shapes: of each on this device.
      specs: how each is split.
      sizes: the devices along each axis of the mesh.

    Returns:
      The deals, those whose matrices cost most to orthogonalize first.
    """
    groups: dict[tuple[tuple[int, ...], tuple[Split, ...]], list[int]] = {}
    for place, (shape, spec) in enumerate(zip(shapes, specs, strict=True)):
        splits = tuple(
            (dim, entry_axes(entry))
            for dim, entry in enumerate(spec)
            if entry_axes(entry) and dim >= len(shape) - 2
        )
        groups.setdefault((shape, splits), []).append(place)
    number: Counter[tuple[str, ...]] = Counter()
    for (shape, splits), places in groups.items():
        if _has_owners(shape, splits):
            number[splits[0][1]] += len(places)
    loads: dict[tuple[str, ...], list[int]] = {}
    deals = []
    by_cost = sorted(groups.items(), key=lambda item: -_cost(item[0][0], item[0][1], sizes))
    for (shape, splits), places in by_cost:
        if not _has_owners(shape, splits) or number[splits[0][1]] == 1:
            deals += [Deal((place,), splits, False) for place in places]
            continue
        ((_, axes),) = splits
        load = loads.setdefault(axes, [0] * math.prod(sizes[axis] for axis in axes))
        least = sorted(range(len(load)), key=lambda device: load[device])
        owners = tuple(least[: len(places) % len(load)])
        for device in owners:
            load[device] += _cost(shape, splits, sizes)
        deals.append(Deal(tuple(places), splits, True, owners))
    return deals


def _has_owners(shape: tuple[int, ...], splits: tuple[Split, ...]) -> bool:
    return len(splits) == 1 and len(shape) == 2


def _cost(shape: tuple[int, ...], splits: tuple[Split, ...], sizes: Mapping[str, int]) -> int:
    """Return the multiplications of an iteration, up to a factor."""
    whole = list(shape)
    for dim, axes in splits:
        whole[dim] *= math.prod(sizes[axis] for axis in axes)
    return math.prod(whole) * min(whole[-2:])


def orthogonalize_leaves(
    leaves: Sequence[jax.Array], specs: Sequence[P], iterations: int
) -> list[jax.Array]:
    """Return this device's parts of the orthogonal matrices of leaves of which it has parts."""
    done: dict[int, jax.Array] = {}
    sizes = {axis: axis_size((axis,)) for spec in specs for axis in axes_of(spec)}
    for deal in deal_out([leaf.shape for leaf in leaves], specs, sizes):
        if deal.by_owner:
            own = _by_owner([leaves[i] for i in deal.places], deal, iterations)
        else:
            own = [_gathered(leaves[i], deal.splits, iterations) for i in deal.places]
        done.update(zip(deal.places, own, strict=True))
    return [done[i] for i in range(len(leaves))]


def _gathered(x: jax.Array, splits: Sequence[Split], iterations: int) -> jax.Array:
    for dim, axes in splits:
        x = all_gather(x, axes, dim=dim, name="muon")
    x = newton_schulz(x, iterations)
    for dim, axes in splits:
        length = x.shape[dim] // axis_size(axes)
        x = lax.dynamic_slice_in_dim(x, axis_index(axes) * length, length, dim)
    return x


def _by_owner(parts: Sequence[jax.Array], deal: Deal, iterations: int) -> list[jax.Array]:
    ((dim, axes),) = deal.splits
    devices = axis_size(axes)
    each = len(parts) // devices  # and one more for the owners
    rows: list[list[int | None]] = [[*range(i * each, i * each + each)] for i in range(devices)]
    if deal.owners:
        last = dict(zip(deal.owners, range(devices * each, len(parts)), strict=True))
        rows = [[*row, last.get(i)] for i, row in enumerate(rows)]
    dealt = [place for row in rows for place in row]
    empty = jnp.zeros_like(parts[0])
    stack = jnp.stack([empty if i is None else parts[i] for i in dealt])
    # The dims of the matrices come after that of the stack.
    whole = all_to_all(stack, axes, split_dim=0, concat_dim=dim + 1, name="muon")
    done = [newton_schulz(whole[:each], iterations)] if each else []
    if deal.owners:
        is_owner = jnp.any(axis_index(axes) == jnp.asarray(deal.owners))
        orthogonalize = partial(newton_schulz, iterations=iterations)
        done.append(lax.cond(is_owner, orthogonalize, lambda x: x, whole[each:]))
    whole = jnp.concatenate(done)
    back = all_to_all(whole, axes, split_dim=dim + 1, concat_dim=0, name="muon")
    return [back[dealt.index(i)] for i in range(len(parts))]


def predict_exchanges(
    params: Params, specs: PyTree, sizes: Mapping[str, int]
) -> list[optimizer.Exchange]:
    """Predict what orthogonalizing whole matrices sends.

    Args:
      params: the matrices, or their shapes.
      specs: a PartitionSpec for each, of how its gradient is split.
      sizes: the devices along each axis of the mesh.
    """
    leaves, found = jax.tree.leaves(params), []
    own_specs = jax.tree.leaves(specs)
    parts = [
        shape_of_part(leaf.shape, spec, sizes) for leaf, spec in zip(leaves, own_specs, strict=True)
    ]
    for deal in deal_out(parts, own_specs, sizes):
        first = deal.places[0]
        dtype = jnp.dtype(checks.accumulator(leaves[first].dtype)).name
        elements = math.prod(parts[first])
        if deal.by_owner:
            ((_, axes),) = deal.splits
            devices = math.prod(sizes[axis] for axis in axes)
            dealt = -(-len(deal.places) // devices) * devices * elements
            found += [optimizer.Exchange("all-to-all", axes, dtype, dealt)] * 2
            continue
        for _, axes in deal.splits:
            elements *= math.prod(sizes[axis] for axis in axes)
            found.append(optimizer.Exchange("all-gather", axes, dtype, elements))
    return found


def whole_shape(shape: tuple[int, ...], spec: P) -> tuple[int, ...]:
    """Return the shape of an array of which this device holds a part."""
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    sizes = [axis_size(axes) if (axes := entry_axes(entry)) else 1 for entry in entries]
    return tuple(size * own for size, own in zip(shape, sizes, strict=True))
