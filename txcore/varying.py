"""Handle values that vary along mesh axes: cast them alike, run them untracked, claim facts."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax

from txcore import _compat


def match_varying(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Cast every array to vary along the union of the axes that any of them varies along.

    custom_vjp and pallas_call refuse operands whose varying axes differ; this is the one
    place where they are made to agree. The transpose of such a cast is a psum without a tag
    ("autodiff" in an audit): cast parameters with `tx.vary` first to have it tagged.
    """
    union = _union_of_axes(arrays)
    missing = [tuple(sorted(union - _compat.varying_axes(a))) for a in arrays]
    return tuple(
        _compat.cast_to_varying(a, axes) if axes else a
        for a, axes in zip(arrays, missing, strict=True)
    )


def _union_of_axes(arrays: tuple[jax.Array, ...]) -> frozenset[str]:
    return frozenset[str]().union(*(_compat.varying_axes(a) for a in arrays))


def run_untracked(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """Call a function inside which jax does not track what varies; its results vary as the arrays.

    An interpreted Pallas kernel is such a function: jax traces it without varying axes, and then
    refuses to run that on operands that have some (its loops' carries and literals have none).
    Not to be differentiated, and without collectives: call it inside a custom VJP.

    Args:
      function: called with the arrays; returns a pytree of arrays.
      *arrays: operands that vary along the same axes (`match_varying`).

    Returns:
      What the function returns, cast to vary along the arrays' axes.
    """
    axes = tuple(sorted(_union_of_axes(arrays)))
    if not axes:
        return function(*arrays)
    results = function(*(claim(a, "", (), drop=axes) for a in arrays))
    return jax.tree.map(lambda result: _compat.cast_to_varying(result, axes), results)


CLAIM = "claim"
# What algorithms of several steps claim of their results: the mean over the devices, or of it the
# shard of each. They are believed; tests compare the algorithms with float64 NumPy.
MEAN = "mean"
MEAN_SHARD = "mean shard"
# What kernels that communicate claim of theirs: the sum over the devices; all devices' shards.
SUM = "sum"
GATHERED = "gathered"


def claim(
    x: jax.Array,
    kind: str,
    axes: tuple[str, ...],
    *,
    what: str = "",
    error: str = "",
    add: Iterable[str] = (),
    drop: Iterable[str] = (),
) -> jax.Array:
    """Return `x` with a claim about it in the traced program, which can be checked there.

    The compiled program contains nothing of it. Its transpose is the identity, without the claim.

    Args:
      x: an array.
      kind: what is claimed along each of the axes: "equal" (all devices hold the same), "differs",
        "part" (it differs, or is zero), "whole" (it is not made of one slice of what a loop goes
        over), "" for nothing. `MEAN` and `MEAN_SHARD` say that it is the mean over the devices
        along all of the axes, or a part.
      axes: mesh axes.
      what: what errors call the value.
      error: the text of the error where the claim is false; "{axis}" stands for the axes along
        which it is, "{source}" for the line that made it.
      add: axes along which the result is typed as varying.
      drop: axes along which the result is typed as invariant.
    """
    return _make_claim().bind(
        *(x,),
        **{"kind": kind, "mesh_axes": axes, "what": what, "error": error},
        **{"add": tuple(sorted(add)), "drop": tuple(sorted(drop))},
    )


@functools.cache
def _make_claim() -> Any:
    from jax.extend.core import Primitive
    from jax.interpreters import ad, batching, mlir

    claim = Primitive(CLAIM)
    claim.def_impl(lambda x, **_: x)
    claim.def_abstract_eval(_retype_claim)
    mlir.register_lowering(claim, lambda ctx, x, **_: [x])
    batching.primitive_batchers[claim] = lambda args, dims, **params: (
        claim.bind(args[0], **params),
        dims[0],
    )
    ad.deflinear2(claim, _transposed_claim)
    return claim


def _retype_claim(aval: Any, *, add: tuple[str, ...], drop: tuple[str, ...], **_: Any) -> Any:
    if not add and not drop:
        return aval
    axis_type = aval.manual_axis_type
    varying = (axis_type.varying | set(add)) - set(drop)
    # A callback's result has no mesh yet, as a type that varies needs.
    return aval.update(
        sharding=aval.sharding.update(mesh=jax.sharding.get_abstract_mesh()),
        manual_axis_type=axis_type.update(varying=varying, reduced=axis_type.reduced - set(add)),
    )


def _transposed_claim(cotangent: Any, _: Any, **params: Any) -> list[Any]:
    from jax.interpreters import ad

    if type(cotangent) is ad.Zero:
        return [cotangent]
    return [claim(cotangent, "", (), add=params["drop"], drop=params["add"])]


def inputs_needed_by(jaxpr: Any, outputs: list[bool]) -> tuple[bool, list[bool]]:
    """Return which inputs the chosen outputs of a traced program depend on.

    Args:
      jaxpr: a Jaxpr or ClosedJaxpr.
      outputs: for each output whether it is chosen.

    Returns:
      Whether computing them takes any operation at all, and for each input whether they need it
      (or may: what jax does not see through counts as needing everything).
    """
    from jax.interpreters import partial_eval

    live, used = partial_eval.dce_jaxpr(getattr(jaxpr, "jaxpr", jaxpr), outputs)
    bodies = [getattr(eqn.params.get("jaxpr"), "eqns", [eqn]) for eqn in live.eqns]
    computes = any(eqn.primitive.name != CLAIM for body in bodies for eqn in body)
    return computes, used
