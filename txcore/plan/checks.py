"""What does not go together in a `Plan`, whatever the model."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from jax.sharding import PartitionSpec as P

from txcore.layout import axes_of, entry_axes
from txcore.parallel.gradients.algorithms import is_power_of_two
from txcore.plan.rules import check_rules

_EXAMPLES = {
    "data_parallel": "tx.DP(axis=...)",
    "tensor_parallel": "tx.TP(axis, rules=...)",
    "pipeline": "tx.PP(axis, microbatches=...)",
    "context": "'context', the axis' name",
}
_USUAL = {"data_parallel": "data", "tensor_parallel": "model", "pipeline": "pipe"}


def check_kinds(plan: Any, kinds: Mapping[str, type]) -> None:
    """Refuse what is no kind of parallelism, or none of that option's.

    Raises:
      TypeError: naming the option, and what to write.
    """
    for option, kind in {**kinds, "context": str}.items():
        given = getattr(plan, option)
        if given is not None and not isinstance(given, kind):
            what = "a mesh axis name" if kind is str else f"a tx.{kind.__name__}"
            raise TypeError(
                f"Plan needs {option}= {what} or None, got {given!r}: write "
                f"tx.Plan({option}={_EXAMPLES[option]})"
            )


def axes_by_kind(plan: Any) -> Iterator[tuple[str, str]]:
    """Go over the axes of each kind of parallelism, as (option of the plan, axis)."""
    dp, tensor, pipeline = plan.data_parallel, plan.tensor_parallel, plan.pipeline
    for axis in () if dp is None else dp.axes:
        yield "data_parallel", axis
    if tensor is not None:
        yield "tensor_parallel", tensor.axis
    if pipeline is not None:
        yield "pipeline", pipeline.axis
    if plan.context is not None:
        yield "context", plan.context


def check_axes(plan: Any) -> None:
    """Refuse an axis that means two things.

    Raises:
      TypeError: a rule or a spec is none.
      ValueError: two kinds of parallelism have the same axis, or a spec of a parameter or of the
        batch has one that cannot split it.
    """
    taken: dict[str, str] = {}
    for option, axis in axes_by_kind(plan):
        if axis in taken:
            first, second = (_USUAL.get(kind, kind) for kind in (taken[axis], option))
            raise ValueError(
                f"Plan needs {option}= an axis of its own, got {axis!r}, which {taken[axis]}= has "
                "too: give the mesh one axis more, as "
                f"MeshSpec(axes=({first!r}, {second!r}), shape=...)"
            )
        taken[axis] = option
    averaged = [a for a, option in taken.items() if option in ("data_parallel", "context")]
    check_rules(plan.params, tuple(averaged))
    for pattern, spec in plan.params.items():
        if plan.pipeline is not None and plan.pipeline.axis in axes_of(spec):
            raise ValueError(
                f"Plan needs params= over other axes than the pipeline's, got "
                f"{plan.pipeline.axis!r} for {pattern!r}: a pipeline splits the layers of "
                "params['blocks'] itself, and each stage has the other parameters whole"
            )
    for key, spec in plan.batch.items():
        _check_batch_spec(plan, key, spec)


def _check_batch_spec(plan: Any, key: str, spec: Any) -> None:
    if not isinstance(spec, P):
        raise TypeError(
            f"Plan needs batch= PartitionSpecs by key, got {spec!r} for {key!r}: write "
            f"jax.sharding.PartitionSpec({spec!r})"
        )
    rule = f"Plan(batch={{{key!r}: P({', '.join(map(repr, spec))})}})"
    axes = axes_of(spec)
    if len(set(axes)) != len(axes):
        raise ValueError(
            f"{rule} needs each mesh axis once, since an axis splits one dim: leave one out"
        )
    if plan.pipeline is not None and plan.pipeline.axis in axes:
        raise ValueError(
            f"{rule} needs other axes than the pipeline's, got {plan.pipeline.axis!r}: every stage "
            "takes its microbatches of the same batch. Split it over a data axis"
        )
    dp, tensor = plan.data_parallel, plan.tensor_parallel
    first = entry_axes(spec[0]) if len(spec) else ()
    if dp is not None and tensor is not None and tensor.axis in first and {*dp.axes} & {*first}:
        raise ValueError(
            f"{rule} needs the rows of the batch split over data axes alone, got {tensor.axis!r} "
            "too: the devices along it compute one result of the same examples. Write "
            f"P({dp.axis!r}), or split another dim"
        )


def check_together(plan: Any) -> None:
    """Refuse kinds of parallelism that cannot be had together.

    Raises:
      ValueError: naming both, and what to write.
    """
    dp = plan.data_parallel
    if dp is None:
        return
    parts = [name for name in ("params", "tensor_parallel", "pipeline") if getattr(plan, name)]
    if dp.reduction == "adasum" and parts:
        raise ValueError(
            "Plan needs parameters that are whole with DP(reduction='adasum'), which takes the "
            f"products of whole gradients, got {parts[0]}={getattr(plan, parts[0])!r}: write "
            f"reduction='mean', or leave {parts[0]}= out"
        )
    if plan.context is not None and not (dp.sync_every == 1 and dp.reduction == "mean"):
        option = f"sync_every={dp.sync_every}" if dp.sync_every > 1 else "reduction='adasum'"
        raise ValueError(
            f"Plan needs gradients that are averaged in each step with context={plan.context!r}, "
            f"along which the devices have parts of the same sequences, got DP({option}): leave "
            "one of them out"
        )


def check_adasum(plan: Any, sizes: Mapping[str, int]) -> None:
    """Refuse Adasum over devices that cannot be joined in pairs.

    Raises:
      ValueError: with their number.
    """
    devices = math.prod(sizes[axis] for axis in plan.data_axes)
    adds = plan.data_parallel is not None and plan.data_parallel.reduction == "adasum"
    if adds and not is_power_of_two(devices):
        raise ValueError(
            "DP(reduction='adasum') needs 1, 2, 4, 8, ... devices over its axes, which it "
            f"joins in pairs, got {devices}: take a power of two, or reduction='mean'"
        )


def check_shards_in_stages(plan: Any, sizes: Mapping[str, int]) -> None:
    """Refuse gradients in shards where a pipeline adds them up whole.

    Raises:
      ValueError: naming both, and what to write.
    """
    dp, pipeline = plan.data_parallel, plan.pipeline
    if dp is None or dp.shard != "gradients" or pipeline is None or sizes[pipeline.axis] == 1:
        return
    raise ValueError(
        f"Plan needs shard= 'optimizer', 'parameters' or None with a pipeline over "
        f"{sizes[pipeline.axis]} devices of {pipeline.axis!r}, got 'gradients': there the "
        "gradients of all microbatches add up whole before they are sent, so that it would save "
        "nothing beside 'optimizer'. Write shard='optimizer', the same numbers and bytes"
    )
