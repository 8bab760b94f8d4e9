"""Copies of a state that have to be equal bit for bit: compared by digests, or made equal.

A digest is two 32-bit words, made where the copy lies. A change within one 32-bit word of a leaf
always changes it; other differences go unnoticed with a probability of 2**-32 at most (2**-64 where
they are spread over the leaf). NaNs are equal where their bits are, 0.0 and -0.0 are not.
"""

import functools
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
from txcore.launch.verdict import rank_names

MOST_LEAVES = 8  # that differ, in a message
MOST_DEVICES = 8  # of a group, in a message
SLICES = 32  # of a leaf that are folded into one, in one pass over memory
_FOLDED = 1 << 16  # words that need no folding

_ODD = np.uint32(0x9E3779B1)
_SALTS = (np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35))


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
        verb = "differs" if len(odd) == 1 else "differ"
        if _ranks(reference).isdisjoint(_ranks(odd)):
            verb = "differs" if len(_ranks(odd)) == 1 else "differ"
            who, whom = rank_names(_ranks(odd)), rank_names(_ranks(reference))
            return f"{self.leaf}: {who} {verb} from {whom} ({_names(odd)})"
        return f"{self.leaf}: {_names(odd)} {verb} from {_names(reference)}"


def _ranks(devices: Sequence[jax.Device]) -> set[int]:
    return {device.process_index for device in devices}


def _names(devices: Sequence[jax.Device]) -> str:
    several = jax.process_count() > 1
    names = [f"{d.id} of rank {d.process_index}" if several else str(d.id) for d in devices]
    if len(names) > MOST_DEVICES + 1:
        names = [*names[:MOST_DEVICES], f"{len(names) - MOST_DEVICES} others"]
    head = "device" if len(names) == 1 else "devices"
    return f"{head} {' and '.join([', '.join(names[:-1])] * (len(names) > 1) + names[-1:])}"


def find_differences(tree: Any, mesh: Mesh) -> list[Difference]:
    """Compare the copies of each leaf over the devices of a mesh; every process has to come.

    Args:
      tree: pytree of arrays that lie on the mesh.
      mesh: its devices; axes over which a leaf is split hold no copies of each other.

    Returns:
      The leaves that differ, `MOST_LEAVES` of them, the same on every process.
    """
    found = [
        (path, _on_mesh(leaf, mesh)) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
    specs = tuple(_spec(leaf) for _, leaf in found)
    digests = [_digest_on(mesh, spec)(leaf) for (_, leaf), spec in zip(found, specs, strict=True)]
    flags = np.asarray(_compare_on(mesh, specs)(digests)) if found else np.zeros(0)
    bad = np.flatnonzero(flags)[:MOST_LEAVES]
    if not bad.size:
        return []
    rows = np.asarray(_gather_on(mesh)([digests[i] for i in bad]))
    return [
        Difference(_line(*found[i]), _groups(found[i][1], mesh, rows[:, k]))
        for k, i in enumerate(bad)
    ]


def _spec(leaf: jax.Array) -> P:
    assert isinstance(leaf.sharding, NamedSharding)
    return leaf.sharding.spec


def _same_mesh(one: Any, other: Mesh) -> bool:
    same_axes = one.axis_names == other.axis_names and one.devices.shape == other.devices.shape
    return same_axes and bool((one.devices == other.devices).all())


def describe(tree: Any) -> list[str]:
    """Return a line for each leaf: its path, dtype and shape."""
    return [_line(path, leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _line(path: Any, leaf: Any) -> str:
    field, *rest = path
    name = f"{getattr(field, 'key', field)}{jax.tree_util.keystr(tuple(rest))}"
    return f"{name} {jnp.result_type(leaf)}[{','.join(map(str, np.shape(leaf)))}]"


def _on_mesh(leaf: Any, mesh: Mesh) -> jax.Array:
    """Return a leaf as it lies on the mesh; a host's own one copied to all of its devices."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and _same_mesh(sharding.mesh, mesh):
        return leaf
    host = np.asarray(jax.random.key_data(leaf) if _compat.is_key_array(leaf) else leaf)
    return jax.make_array_from_callback(host.shape, NamedSharding(mesh, P()), lambda at: host[at])


def _groups(leaf: jax.Array, mesh: Mesh, digests: np.ndarray) -> tuple[tuple[jax.Device, ...], ...]:
    """Return the devices by what they hold; of parts of a leaf, those of the first that differs."""
    parts: dict[str, dict[bytes, list[jax.Device]]] = {}
    places = leaf.sharding.devices_indices_map(leaf.shape)
    for device, digest in zip(mesh.devices.flat, digests, strict=True):
        part = parts.setdefault(str(places[device]), {})
        part.setdefault(digest.tobytes(), []).append(device)
    first = next(part for part in parts.values() if len(part) > 1)
    return tuple(tuple(g) for g in sorted(first.values(), key=lambda group: -len(group)))


# The programs. A leaf's copies are typed as equal, so each device's digest is made varying first.


@functools.lru_cache(maxsize=256)
def _digest_on(mesh: Mesh, spec: P) -> Callable[[jax.Array], jax.Array]:
    def digest_of(leaf: jax.Array) -> jax.Array:
        return vary(digest(leaf)[None], mesh.axis_names)

    mapped = jax.shard_map(digest_of, mesh=mesh, in_specs=spec, out_specs=P(mesh.axis_names))
    return jax.jit(mapped)


@functools.lru_cache(maxsize=64)
def _compare_on(mesh: Mesh, specs: tuple[P, ...]) -> Callable[[list[jax.Array]], jax.Array]:
    """Return a program that tells for each leaf, on every device, whether any copies differ."""
    names = mesh.axis_names
    split = [frozenset(jax.tree.leaves(tuple(spec))) for spec in specs]

    def compare(digests: list[jax.Array]) -> jax.Array:
        flags = [jnp.int32(0)] * len(digests)
        for axes in set(split):
            places = [i for i, own in enumerate(split) if own == axes]
            rows = jnp.concatenate([digests[i] for i in places])
            copies = tuple(a for a in names if a not in axes)
            if not copies:
                continue
            # The largest of x and of ~x: the copies are equal where these belong together.
            most = pmax(jnp.stack([rows, ~rows]), copies, name="replicas")
            differ = jnp.any(most[0] != ~most[1], axis=1).astype(jnp.int32)
            if axes:
                differ = pmax(differ, tuple(a for a in names if a in axes), name="replicas")
            for k, i in enumerate(places):
                flags[i] = differ[k]
        return jnp.stack(flags)

    mapped = jax.shard_map(compare, mesh=mesh, in_specs=P(names), out_specs=P())
    return jax.jit(mapped)


@functools.lru_cache(maxsize=16)
def _gather_on(mesh: Mesh) -> Callable[[list[jax.Array]], jax.Array]:
    names = mesh.axis_names

    def gather(digests: list[jax.Array]) -> jax.Array:
        return all_gather(jnp.stack(digests, axis=1), names, invariant=True, name="replicas")

    return jax.jit(jax.shard_map(gather, mesh=mesh, in_specs=P(names), out_specs=P()))


def digest(leaf: jax.Array) -> jax.Array:
    """Return the digest of one array, of any dtype and shape: uint32[2].

    Example:
      >>> from txcore.train.replicas import digest
      >>> zero, minus = digest(jax.numpy.zeros(3)), digest(-jax.numpy.zeros(3))
      >>> bool((zero == minus).any())
      False
    """
    if _compat.is_key_array(leaf):
        leaf = jax.random.key_data(leaf)
    folded = leaf.reshape(-1)
    if folded.size <= _FOLDED:
        folded = jnp.concatenate(_words(folded))
    while folded.size > _FOLDED:
        folded = _fold(folded)
    places = lax.iota(jnp.uint32, folded.size) * _ODD
    return jnp.stack([jnp.sum(_mix(folded ^ (places + s)), dtype=jnp.uint32) for s in _SALTS])


def _fold(flat: jax.Array) -> jax.Array:
    """Fold slices of a flat array into one, word by word: one pass, without a copy of the array.

    The words of all slices at one place go one after the other through a bijection.
    """
    size = -(-flat.size // SLICES)
    folded = jnp.full((size,), _ODD, jnp.uint32)
    for start in range(0, flat.size, size):
        part = lax.slice(flat, (start,), (min(start + size, flat.size),))
        part = lax.pad(part, jnp.zeros((), part.dtype), [(0, size - part.size, 0)])
        for words in _words(part):
            folded = (folded ^ words) * _ODD
            folded = folded ^ (folded >> np.uint32(15))
    return folded


def _mix(words: jax.Array) -> jax.Array:
    """Mix the bits of each word; a bijection (C. Wellons, "Prospecting for hash functions")."""
    words = (words ^ (words >> np.uint32(16))) * np.uint32(0x7FEB352D)
    words = (words ^ (words >> np.uint32(15))) * np.uint32(0x846CA68B)
    return words ^ (words >> np.uint32(16))


def _words(x: jax.Array) -> list[jax.Array]:
    """Return the bits of each element in 32-bit words: a list of arrays of its shape."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return [*_words(lax.real(x)), *_words(lax.imag(x))]
    if x.dtype.itemsize == 8:
        pairs = lax.bitcast_convert_type(x, jnp.uint32)
        return [pairs[..., 0], pairs[..., 1]]
    if x.dtype.itemsize == 4:
        return [lax.bitcast_convert_type(x, jnp.uint32)]
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = lax.bitcast_convert_type(x, f"uint{jnp.finfo(x.dtype).bits}")
    return [lax.convert_element_type(x, jnp.uint32)]


def _of_words(words: Sequence[jax.Array], dtype: Any) -> jax.Array:
    """Return the elements that `_words` made the words of."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        half = len(words) // 2
        part = jnp.dtype("float32" if half == 1 else "float64")
        return lax.complex(_of_words(words[:half], part), _of_words(words[half:], part))
    if dtype.itemsize == 8:
        return lax.bitcast_convert_type(jnp.stack(words, axis=-1), dtype)
    if dtype.itemsize == 4:
        return lax.bitcast_convert_type(words[0], dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        bits = lax.convert_element_type(words[0], f"uint{jnp.finfo(dtype).bits}")
        return lax.bitcast_convert_type(bits, dtype)
    return lax.convert_element_type(words[0], dtype)


# One rank's values for all. Their bits are sent: a sum would make 0.0 of -0.0, and a NaN another.


def send_from(tree: Any, mesh: Mesh, root: int) -> Any:
    """Return the values of one process's tree on every device of a mesh; every process has to come.

    Args:
      tree: pytree of host arrays of the same shapes and dtypes on every process, or typed keys.
      mesh: the devices.
      root: the place of a device in the mesh whose process's values are taken.

    Returns:
      Arrays that are the same on every device, typed as such.
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

    def send(tree: Any) -> Any:
        rows = jax.tree.map(lambda x: _words(x[0]), tree)
        sent = broadcast(rows, mesh.axis_names, root, name="state")
        return jax.tree.map(lambda x, words: _of_words(words, x.dtype), tree, sent)

    rows, whole = P(mesh.axis_names), P()
    return jax.jit(jax.shard_map(send, mesh=mesh, in_specs=rows, out_specs=whole))


def sending_shapes(tree: Any, mesh: Mesh) -> Any:
    """Return the shapes that `sending_program` takes to send a tree."""
    sharding = NamedSharding(mesh, P(mesh.axis_names))

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        data = jax.eval_shape(jax.random.key_data, leaf) if _compat.is_key_array(leaf) else leaf
        return jax.ShapeDtypeStruct((mesh.size, *data.shape), data.dtype, sharding=sharding)

    return jax.tree.map(shape, tree)
