"""Path rules: which parameters are stored in parts, and over which axes."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from txcore.layout import axes_of, entry_axes
from txcore.mesh import MeshSpec
from txcore.path_rules import leaf_names, match_rules, path_name, shorten_names
from txcore.plan.pipeline_parallel import PP
from txcore.plan.tensor_parallel import TP


def check_rules(rules: Any, data_axes: tuple[str, ...]) -> None:
    """Refuse rules that are wrong on every mesh and for every model.

    Raises:
      TypeError: a rule is no path with a PartitionSpec.
      ValueError: it names an axis twice, or a data axis.
    """
    if not isinstance(rules, Mapping):
        raise TypeError(
            "Plan needs params= a dict of PartitionSpecs by path, got "
            f"{type(rules).__name__}: write params={{'mlp/w1': PartitionSpec(None, 'model')}}"
        )
    for pattern, spec in rules.items():
        if not isinstance(pattern, str) or not pattern:
            raise TypeError(
                f"Plan needs params= PartitionSpecs by path, got {pattern!r} as a path: write the "
                "keys with slashes between them, as 'mlp/w1', with * for any characters"
            )
        if not isinstance(spec, P):
            raise TypeError(
                f"Plan needs params= PartitionSpecs by path, got {spec!r} for {pattern!r}: write "
                f"jax.sharding.PartitionSpec({spec!r})"
            )
        _check_spec(pattern, spec, data_axes)


def _check_spec(pattern: str, spec: P, data_axes: tuple[str, ...]) -> None:
    axes = axes_of(spec)
    if any(not isinstance(axis, str) for axis in axes):
        raise TypeError(
            f"{_format_rule(pattern, spec)} needs a mesh axis, a tuple of them, or None for each "
            "dim: what is not split is None"
        )
    if len(set(axes)) != len(axes):
        raise ValueError(
            f"{_format_rule(pattern, spec)} needs each mesh axis once, since an axis splits one "
            "dim: leave one out, or use another axis for it"
        )
    if both := [axis for axis in axes if axis in data_axes]:
        raise ValueError(
            f"{_format_rule(pattern, spec)} needs other axes than the data axes, got {both[0]!r}: "
            "a step computes the examples of each device there with the same parameters. Split "
            "over another axis of the mesh, as MeshSpec(axes=('data', 'model'), shape=...)"
        )


def stored_specs(
    rules: Mapping[str, P],
    params: Any,
    mesh: MeshSpec,
    tensor: TP | None = None,
    pipeline: PP | None = None,
) -> Any:
    """Return how each parameter is stored.

    The first of `rules` that its path matches says all of it; else a pipeline splits its layers,
    the first rule of tensor parallelism one of its dims, and what none names is whole.

    Args:
      rules: PartitionSpecs by path, as `Plan(params=)` takes them.
      params: pytree of arrays or shapes.
      mesh: the devices and their axes.
      tensor: the plan's tensor parallelism.
      pipeline: the plan's pipeline.

    Returns:
      A pytree of PartitionSpecs with the structure of `params`.

    Raises:
      ValueError: a rule matches nothing, or only what rules before it took; it has more dims than
        a parameter, or devices that do not divide one.
    """
    found = jax.tree_util.tree_flatten_with_path(params)[0]
    names = leaf_names(params)
    first = match_rules([*rules], names, lambda rule: _format_rule(rule, rules[rule]))
    split = [None] * len(names) if tensor is None else _match_dims(tensor, names)
    layers = {} if pipeline is None else split_layers(pipeline, found, mesh)
    specs = []
    for (path, leaf), own, dim in zip(found, first, split, strict=True):
        where, shape = f"params{jax.tree_util.keystr(path)}", np.shape(leaf)
        if own is not None:
            if path in layers:
                raise ValueError(
                    f"{_format_rule(own, rules[own])} needs other parameters than the layers of a "
                    f"pipeline, got {where}, which {pipeline} splits: name the dim in "
                    "TP(rules={path: dim from the end}), which goes together with it"
                )
            spec = rules[own]
            check_fits(_format_rule(own, spec), spec, where, shape, mesh)
        else:
            spec = layers.get(path, P())
            if tensor is not None and dim is not None:
                spec = _split_dim(tensor, dim, spec, where, shape, mesh)
        specs.append(spec)
    return jax.tree.unflatten(jax.tree.structure(params), specs)


def split_layers(pp: PP, found: list[tuple[Any, Any]], mesh: MeshSpec) -> dict[Any, P]:
    """Return how a pipeline splits each parameter of its layers, `params["blocks"]`, by path.

    Args:
      pp: the plan's pipeline.
      found: the parameters with their paths.
      mesh: the devices and their axes.

    Raises:
      ValueError: there are none, or their layers do not lie as the stages and chunks need them.
    """
    blocks = [(path, np.shape(leaf)) for path, leaf in found if is_of_blocks(path)]
    if not blocks:
        names = shorten_names(list(dict.fromkeys(path_name(path[:1]) for path, _ in found)))
        raise ValueError(
            f"{pp} needs params['blocks'], the layers stacked in the first dim of its leaves, got "
            f"params with {names}: write {{'blocks': jax.tree.map(lambda *x: np.stack(x), *layers),"
            " ...}"
        )
    first: tuple[str, int] | None = None
    for path, shape in blocks:
        where = f"params{jax.tree_util.keystr(path)}"
        layers = _count_layers(pp, where, shape, mesh.shape[pp.axis])
        if first is not None and layers != first[1]:
            raise ValueError(
                f"{pp} needs as many layers in all of params['blocks'], got {layers} in {where} "
                f"and {first[1]} in {first[0]}: put what is no layer beside 'blocks'"
            )
        first = where, layers
    spec = P(*[None] * (pp.chunks > 1), pp.axis)
    return {path: spec for path, _ in blocks}


def _count_layers(pp: PP, where: str, shape: tuple[int, ...], stages: int) -> int:
    """Return the number of layers of a leaf; refuse one that stages and chunks do not divide."""
    chunks, leading = pp.chunks, 1 + (pp.chunks > 1)
    if len(shape) < leading or (chunks > 1 and shape[0] != chunks):
        raise ValueError(
            f"{pp} needs {where} of shape "
            + (f"({chunks}, layers / {chunks}, ...)" if chunks > 1 else "(layers, ...)")
            + f", got {shape}: stack the layers"
            + (f", then x.reshape({chunks}, -1, *x.shape[1:])" if chunks > 1 else "")
        )
    in_chunk = shape[leading - 1]
    layers = in_chunk * chunks
    if not layers or in_chunk % stages:
        of_chunks = f" x {chunks} chunks" if chunks > 1 else ""
        least = -(-max(layers, 1) // (stages * chunks)) * stages * chunks
        raise ValueError(
            f"{pp} needs a number of layers that {stages} stages{of_chunks} divide, got {layers} "
            f"in {where}, shape {shape}: make it {least} layers, or use fewer stages"
        )
    return layers


def is_of_blocks(path: Any) -> bool:
    """Tell whether a parameter belongs to the layers of a pipeline: `params["blocks"]`."""
    return bool(path) and getattr(path[0], "key", None) == "blocks"


def split_chunks(pipeline: PP | None, params: Any) -> Any:
    """Return parameters with each leaf of `params["blocks"]` as a pipeline of chunks stores it.

    Args:
      pipeline: the plan's.
      params: pytree of arrays or shapes, the layers stacked: (layers, ...).

    Returns:
      The pytree; where a stage has several chunks the layers are (chunks, layers / chunks, ...).

    Raises:
      ValueError: the chunks do not divide the layers.
    """
    if pipeline is None or pipeline.chunks == 1:
        return params
    chunks = pipeline.chunks

    def split(path: Any, leaf: Any) -> Any:
        if not is_of_blocks(path):
            return leaf
        shape = np.shape(leaf)
        if not shape or not shape[0] or shape[0] % chunks:
            raise ValueError(
                f"Plan(pipeline={pipeline}) needs the layers stacked in params["
                f"'blocks'], (layers, ...), a multiple of its {chunks} chunks, got shape {shape} "
                f"at params{jax.tree_util.keystr(path)}: take a divisor of the layers as chunks="
            )
        split = (chunks, shape[0] // chunks, *shape[1:])
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(split, leaf.dtype)
        return leaf.reshape(split)

    return jax.tree_util.tree_map_with_path(split, params)


def _match_dims(tensor: TP, names: list[str]) -> list[int | None]:
    rules = match_rules(
        [*tensor.rules], names, lambda rule: f"TP(rules={{{rule!r}: {tensor.rules[rule]}}})"
    )
    return [None if rule is None else tensor.rules[rule] for rule in rules]


def _split_dim(
    tensor: TP, dim: int, spec: P, where: str, shape: tuple[int, ...], mesh: MeshSpec
) -> P:
    """Return `spec` with one dim more split, counted from the end."""
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    rule = f"TP({tensor.axis!r}, rules=...) with dim {dim}"
    if -dim > len(shape) or entries[dim] is not None:
        raise ValueError(
            f"{rule} needs {where} to have that dim beside those that the plan splits already, got "
            f"shape {shape} and {spec}: name another dim in a rule before it"
        )
    entries[dim] = tensor.axis
    check_fits(rule, P(*entries), where, shape, mesh)
    return P(*entries)


def _format_rule(pattern: str, spec: P) -> str:
    entries = ", ".join(map(repr, spec))
    return f"Plan(params={{{pattern!r}: P({entries})}})"


def check_fits(rule: str, spec: P, where: str, shape: tuple[int, ...], mesh: MeshSpec) -> None:
    """Refuse a spec with more dims than a parameter, or with devices that do not divide it."""
    if len(spec) > len(shape):
        raise ValueError(
            f"{rule} needs at least {len(spec)} dims, but {where} has shape {shape}: give one "
            "entry for each dim, or name that parameter in a rule before it"
        )
    for dim, entry in enumerate(spec):
        axes = entry_axes(entry)
        devices = math.prod(mesh.shape[a] for a in axes)
        if shape[dim] % devices:
            names = ", ".join(map(repr, axes))
            larger = -(-shape[dim] // devices) * devices
            raise ValueError(
                f"{rule} needs dim {dim} of {where}, shape {shape}, divisible by the {devices} "
                f"devices along {names}: make it {larger}, split another dim, or use fewer devices"
            )
