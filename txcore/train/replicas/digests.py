"""Compare the copies of a state by digests, or make them equal, bit for bit.

Each copy has a digest of 64 bits (BLAKE2b); one of a large leaf is made of the few words that its
device folds it to. Two small leaves that differ have the same digest with a probability of 2**-64.
So have two large ones that differ within one 32-bit word; others are folded to the same words with
one of 2**-32 at most. NaNs are equal where their bits are, 0.0 and -0.0 are not.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from txcore import _compat
from txcore.collectives.all_gather import all_gather
from txcore.collectives.broadcast import broadcast
from txcore.collectives.pmax import pmax
from txcore.collectives.vary import vary
from txcore.launch.watch.verdict import name_each, rank_names

MOST_LEAVES = 8  # that differ, in a message
SMALL = 1 << 16  # elements of a leaf that is read by the host rather than folded on its device
FOLDED = 1 << 12  # words that a larger one is folded to
SLICES = 32  # that are folded into one
_ODD = np.uint32(0x9E3779B1)


@dataclass(frozen=True)
class Difference:
    """Name a leaf whose copies differ.

    Attributes:
      leaf: its path and type, "stored_params['w'] float32[3]".
      groups: the devices that hold equal copies, the largest group first.
    """

    leaf: str
    groups: tuple[tuple[jax.Device, ...], ...]

    def __str__(self) -> str:
        reference, *others = self.groups
        odd = [device for group in others for device in group]
        ours, theirs = ({d.process_index for d in devices} for devices in (odd, reference))
        who, whom = (name_each("device", [d.id for d in devices]) for devices in (odd, reference))
        if ours.isdisjoint(theirs):
            verb = "differs" if len(ours) == 1 else "differ"
            return f"{self.leaf}: {rank_names(ours)} {verb} from {rank_names(theirs)} ({who})"
        verb = "differs" if len(odd) == 1 else "differ"
        of = f" of {rank_names(ours)}" if jax.process_count() > 1 else ""
        return f"{self.leaf}: {who}{of} {verb} from {whom}"


def find_differences(tree: Any, mesh: Mesh) -> list[Difference]:
    """Compare the copies of each leaf over the devices of a mesh; every process has to call it.

    Args:
      tree: pytree of arrays that lie on the mesh.
      mesh: its devices; axes over which a leaf is split hold no copies of each other.

    Returns:
      The leaves that differ, `MOST_LEAVES` of them, the same on every process.
    """
    found = [
        (path, _on_mesh(leaf, mesh)) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
    if not found:
        return []
    specs = tuple(_spec_of(leaf) for _, leaf in found)
    digests = _make_digests([leaf for _, leaf in found], mesh)
    bad = np.flatnonzero(np.asarray(_compare_on(mesh, specs)(digests)))[:MOST_LEAVES]
    if not bad.size:
        return []
    rows = np.asarray(_gather_on(mesh)(digests))
    return [
        Difference(_describe_leaf(*found[i]), _group_devices(found[i][1], mesh, rows[:, i]))
        for i in bad
    ]


def lies_on_several_ranks(leaf: jax.Array) -> bool:
    """Tell whether some part of a leaf has copies on devices of more than one process."""
    return _has_copies(leaf.sharding, leaf.shape) if isinstance(leaf, jax.Array) else False


@functools.lru_cache(maxsize=256)
def _has_copies(sharding: Any, shape: tuple[int, ...]) -> bool:
    ranks: dict[str, set[int]] = {}
    for device, place in sharding.devices_indices_map(shape).items():
        ranks.setdefault(str(place), set()).add(device.process_index)
    return any(len(having) > 1 for having in ranks.values())


def describe_leaves(tree: Any) -> list[str]:
    """Return a line for each leaf: its path, dtype and shape."""
    return [
        _describe_leaf(path, leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def _describe_leaf(path: Any, leaf: Any) -> str:
    field, *rest = path
    name = f"{getattr(field, 'key', field)}{jax.tree_util.keystr(tuple(rest))}"
    return f"{name} {jnp.result_type(leaf)}[{','.join(map(str, np.shape(leaf)))}]"


def _spec_of(leaf: jax.Array) -> P:
    assert isinstance(leaf.sharding, NamedSharding)
    return leaf.sharding.spec


def _same_mesh(one: Any, other: Mesh) -> bool:
    same_axes = one.axis_names == other.axis_names and one.devices.shape == other.devices.shape
    return same_axes and bool((one.devices == other.devices).all())


def _on_mesh(leaf: Any, mesh: Mesh) -> jax.Array:
    """Return a leaf on the mesh; copy one that lies elsewhere to all of its devices."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and _same_mesh(sharding.mesh, mesh):
        return leaf
    host = np.asarray(jax.random.key_data(leaf) if _compat.is_key_array(leaf) else leaf)
    return jax.make_array_from_callback(host.shape, NamedSharding(mesh, P()), lambda at: host[at])


def _group_devices(
    leaf: jax.Array, mesh: Mesh, digests: np.ndarray
) -> tuple[tuple[jax.Device, ...], ...]:
    """Group the devices by their digests; of a split leaf, for the first part that differs."""
    parts: dict[str, dict[bytes, list[jax.Device]]] = {}
    places = leaf.sharding.devices_indices_map(leaf.shape)
    for device, digest in zip(mesh.devices.flat, digests, strict=True):
        part = parts.setdefault(str(places[device]), {})
        part.setdefault(digest.tobytes(), []).append(device)
    first = next(part for part in parts.values() if len(part) > 1)
    return tuple(tuple(g) for g in sorted(first.values(), key=lambda group: -len(group)))


def _make_digests(leaves: Sequence[jax.Array], mesh: Mesh) -> jax.Array:
    """Return the digests of what each device holds: uint32[devices, leaves, 2]."""
    plain = [jax.random.key_data(x) if _compat.is_key_array(x) else x for x in leaves]
    folded = [x if x.size <= SMALL else _fold_on(mesh, _spec_of(x))(x) for x in plain]
    rows: dict[jax.Device, list[np.ndarray]] = {device: [] for device in mesh.local_devices}
    for leaf in folded:
        for shard in leaf.addressable_shards:
            data = np.asarray(shard.data).tobytes()
            rows[shard.device].append(np.frombuffer(_hash(data).digest(), np.uint32))
    return jax.make_array_from_single_device_arrays(
        (mesh.size, len(leaves), 2),
        NamedSharding(mesh, P(mesh.axis_names)),
        [jax.device_put(np.stack(row)[None], device) for device, row in rows.items()],
    )


_hash = functools.partial(hashlib.blake2b, digest_size=8)


# The programs. A leaf's copies are typed as equal, so what each device makes of its own is cast to
# varying first.


@functools.lru_cache(maxsize=256)
def _fold_on(mesh: Mesh, spec: P) -> Callable[[jax.Array], jax.Array]:
    def fold_own(leaf: jax.Array) -> jax.Array:
        return vary(fold_leaf(leaf)[None], mesh.axis_names)

    mapped = jax.shard_map(fold_own, mesh=mesh, in_specs=spec, out_specs=P(mesh.axis_names))
    return jax.jit(mapped)


@functools.lru_cache(maxsize=64)
def _compare_on(mesh: Mesh, specs: tuple[P, ...]) -> Callable[[jax.Array], jax.Array]:
    """Return a program that tells every device for each leaf whether any copies differ."""
    names = mesh.axis_names
    split = [frozenset(jax.tree.leaves(tuple(spec))) for spec in specs]

    def compare_copies(digests: jax.Array) -> jax.Array:
        flags = [jnp.int32(0)] * len(specs)
        for axes in sorted(set(split), key=sorted):
            places = [i for i, own in enumerate(split) if own == axes]
            copies = tuple(a for a in names if a not in axes)
            if not copies:
                continue
            # The largest of x and of ~x: the copies are equal where these belong together.
            rows = digests[0, np.array(places)]
            most = pmax(jnp.stack([rows, ~rows]), copies, name="replicas")
            differ = jnp.any(most[0] != ~most[1], axis=1).astype(jnp.int32)
            if axes:
                differ = pmax(differ, tuple(a for a in names if a in axes), name="replicas")
            for k, i in enumerate(places):
                flags[i] = differ[k]
        return jnp.stack(flags)

    mapped = jax.shard_map(compare_copies, mesh=mesh, in_specs=P(names), out_specs=P())
    return jax.jit(mapped)


@functools.lru_cache(maxsize=16)
def _gather_on(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    names = mesh.axis_names

    def gather_digests(digests: jax.Array) -> jax.Array:
        return all_gather(digests, names, invariant=True, name="replicas")

    return jax.jit(jax.shard_map(gather_digests, mesh=mesh, in_specs=P(names), out_specs=P()))


def fold_leaf(leaf: jax.Array) -> jax.Array:
    """Return a few 32-bit words that depend on every bit of an array and on where it stands.

    Slices of the array are folded into one, so many at a time, by a bijection of each word: what
    changes within one word of the array always changes the result. Each pass reads its input once
    and copies none of it.

    Args:
      leaf: array of any dtype and shape.

    Returns:
      uint32 array of at most `FOLDED` elements' words.

    Example:
      >>> from txcore.train.replicas.digests import fold_leaf
      >>> zeros = jax.numpy.zeros(10_000)
      >>> fold_leaf(zeros).shape, bool((fold_leaf(zeros) == fold_leaf(-zeros)).all())
      ((313,), False)
    """
    folded = leaf.reshape(-1)
    while folded.size > FOLDED:
        folded = _fold_once(folded)
    return jnp.concatenate(_split_words(folded))


def _fold_once(flat: jax.Array) -> jax.Array:
    size = -(-flat.size // SLICES)
    folded = jnp.full((size,), _ODD, jnp.uint32)
    for start in range(0, flat.size, size):
        part = lax.slice(flat, (start,), (min(start + size, flat.size),))
        part = lax.pad(part, jnp.zeros((), part.dtype), [(0, size - part.size, 0)])
        for words in _split_words(part):
            folded = (folded ^ words) * _ODD
            folded = folded ^ (folded >> np.uint32(15))
    return folded


def _split_words(x: jax.Array) -> list[jax.Array]:
    """Return the bits of each element in 32-bit words: a list of arrays of its shape."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return [*_split_words(lax.real(x)), *_split_words(lax.imag(x))]
    if x.dtype.itemsize == 8:
        pairs = lax.bitcast_convert_type(x, jnp.uint32)
        return [pairs[..., 0], pairs[..., 1]]
    if x.dtype.itemsize == 4:
        return [lax.bitcast_convert_type(x, jnp.uint32)]
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = lax.bitcast_convert_type(x, f"uint{jnp.finfo(x.dtype).bits}")
    return [lax.convert_element_type(x, jnp.uint32)]


def _join_words(words: Sequence[jax.Array], dtype: Any) -> jax.Array:
    """Return the elements whose words `_split_words` returned."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        half = len(words) // 2
        part = jnp.dtype("float32" if half == 1 else "float64")
        return lax.complex(_join_words(words[:half], part), _join_words(words[half:], part))
    if dtype.itemsize == 8:
        return lax.bitcast_convert_type(jnp.stack(words, axis=-1), dtype)
    if dtype.itemsize == 4:
        return lax.bitcast_convert_type(words[0], dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        bits = lax.convert_element_type(words[0], f"uint{jnp.finfo(dtype).bits}")
        return lax.bitcast_convert_type(bits, dtype)
    return lax.convert_element_type(words[0], dtype)


# One rank's values for all. Bits are sent, since a sum would turn -0.0 into 0.0 and change NaNs.


def send_from(tree: Any, mesh: Mesh, root: int) -> Any:
    """Send one process's tree to every device of a mesh; every process has to call it.

    Args:
      tree: pytree of host arrays of the same shapes and dtypes on every process, or typed keys.
      mesh: the devices.
      root: the index in the mesh of a device of the process whose values are sent.

    Returns:
      Arrays that are equal on every device, and typed so.
    """
    sharding = NamedSharding(mesh, P(mesh.axis_names))

    def place(leaf: Any) -> jax.Array:
        host = np.asarray(leaf)
        rows = (mesh.size, *host.shape)
        return jax.make_array_from_callback(rows, sharding, lambda _: host[None])

    keys = jax.tree.map(_compat.is_key_array, tree)
    data = jax.tree.map(lambda x, key: jax.random.key_data(x) if key else x, tree, keys)
    sent = sending_program(mesh, root)(jax.tree.map(place, data))
    return jax.tree.map(
        lambda x, given, key: (
            jax.random.wrap_key_data(x, impl=jax.random.key_impl(given)) if key else x
        ),
        sent,
        tree,
        keys,
    )


@functools.lru_cache(maxsize=16)
def sending_program(mesh: Mesh, root: int) -> Callable[[Any], Any]:
    """Return the program of `send_from`, given a row for each device in each leaf."""

    def send_words(tree: Any) -> Any:
        rows = jax.tree.map(lambda x: _split_words(x[0]), tree)
        sent = broadcast(rows, mesh.axis_names, root, name="state")
        return jax.tree.map(lambda x, words: _join_words(words, x.dtype), tree, sent)

    rows, whole = P(mesh.axis_names), P()
    return jax.jit(jax.shard_map(send_words, mesh=mesh, in_specs=rows, out_specs=whole))


def sending_shapes(tree: Any, mesh: Mesh) -> Any:
    """Return the shapes that `sending_program` takes to send a tree."""
    sharding = NamedSharding(mesh, P(mesh.axis_names))

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        data = jax.eval_shape(jax.random.key_data, leaf) if _compat.is_key_array(leaf) else leaf
        return jax.ShapeDtypeStruct((mesh.size, *data.shape), data.dtype, sharding=sharding)

    return jax.tree.map(shape, tree)
