"""Path rules: which parameters are stored in parts, and over which axes."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from txcore.layout import axes_of, entry_axes
from txcore.mesh import MeshSpec
from txcore.path_rules import leaf_names, match_rules


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
            f"{_rule(pattern, spec)} needs a mesh axis, a tuple of them, or None for each dim: "
            "what is not split is None"
        )
    if len(set(axes)) != len(axes):
        raise ValueError(
            f"{_rule(pattern, spec)} needs each mesh axis once, since an axis splits one dim: "
            "leave one out, or use another axis for it"
        )
    if both := [axis for axis in axes if axis in data_axes]:
        raise ValueError(
            f"{_rule(pattern, spec)} needs other axes than the data axes, got {both[0]!r}: a step "
            "computes the examples of each device there with the same parameters. Split over "
            "another axis of the mesh, as MeshSpec(axes=('data', 'model'), shape=...)"
        )


def stored_specs(rules: Mapping[str, P], params: Any, mesh: MeshSpec) -> Any:
    """Return how each parameter is stored: by the first rule that its path matches, else whole.

    Args:
      rules: PartitionSpecs by path, as `Plan(params=)` takes them.
      params: pytree of arrays or shapes.
      mesh: the devices and their axes.

    Returns:
      A pytree of PartitionSpecs with the structure of `params`.

    Raises:
      ValueError: a rule matches nothing, or only what rules before it took; it has more dims than
        a parameter, or devices that do not divide one.
    """
    found = jax.tree_util.tree_flatten_with_path(params)[0]
    first = match_rules([*rules], leaf_names(params), lambda rule: _rule(rule, rules[rule]))
    specs = []
    for (path, leaf), match in zip(found, first, strict=True):
        spec = P() if match is None else rules[match]
        if match is not None:
            where = f"params{jax.tree_util.keystr(path)}"
            _check_fits(_rule(match, spec), spec, where, np.shape(leaf), mesh)
        specs.append(spec)
    return jax.tree.unflatten(jax.tree.structure(params), specs)


def _rule(pattern: str, spec: P) -> str:
    entries = ", ".join(map(repr, spec))
    return f"Plan(params={{{pattern!r}: P({entries})}})"


def _check_fits(rule: str, spec: P, where: str, shape: tuple[int, ...], mesh: MeshSpec) -> None:
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
