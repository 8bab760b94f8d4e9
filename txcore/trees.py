"""What the trees in annotations hold. To a type checker each is any object."""

from typing import Any, TypeAlias

PyTree: TypeAlias = Any  # what jax.tree.map goes over: arrays in dicts, lists, registered classes
Params: TypeAlias = PyTree  # the parameters of a model
Grads: TypeAlias = PyTree  # like Params; with one more dim in front where it is of each example
OptState: TypeAlias = PyTree  # what an Optimizer keeps between steps
Batch: TypeAlias = PyTree  # arrays with the examples as dim 0
