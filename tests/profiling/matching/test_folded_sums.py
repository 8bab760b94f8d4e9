"""A sum of a sum that XLA for GPU folds into one over all axes, as a pipeline's gradients are."""

import jax
import pytest
from audit_cases import P, mesh_of, on, shape
from jax import lax

from txcore.profiling import audit_compiled
from txcore.profiling.hlo import groups_of_block
from txcore.profiling.hlo.groups import fold_groups

SIZES = {"data": 2, "model": 2, "pipe": 2}


def sums(*axes, rows=16):
    """A program that sums over each of these in turn, and scales in between."""

    def body(x):
        for i, axis in enumerate(axes):
            x = lax.psum(x * (i + 2), axis)
        return x

    mesh = mesh_of(**SIZES)
    spec = P(("data", "pipe"))
    return jax.jit(on(mesh, spec, P(), check_vma=False)(body)).trace(shape(mesh, spec, rows, 8))


def compiled(*axes, **options):
    return sums(*axes, **options).lower().compile()


def audit_as(final, early, declared):
    """Audit as if a program became `final`, which stood as `early` after its partitioning."""
    return audit_compiled(
        compiled(*final), sums(*declared).jaxpr, partition=lambda: compiled(*early).as_text()
    )


def test_one_sum_over_both_axes_does_the_work_of_two():
    report = audit_as([("data", "pipe")], ["pipe", "data"], ["pipe", "data"])
    assert report.ok, report.verdict()
    assert [fate.fates for fate in report.fates] == [("rewritten",)] * 2
    (row,) = report.collectives
    assert set(row.axes) == {"data", "pipe"}


def test_one_over_all_devices_is_not_that():
    report = audit_as([("data", "model", "pipe")], ["pipe", "data"], ["pipe", "data"])
    assert not report.ok
    assert len(report.missing) == 2


def test_one_that_the_partitioner_added_is_not_that():
    both = ("data", "pipe")
    report = audit_as([both], ["pipe", "data", both], ["pipe", "data"])
    assert not report.ok


def test_one_of_another_size_is_not_that():
    report = audit_compiled(
        compiled(("data", "pipe"), rows=32),
        sums("pipe", "data").jaxpr,
        partition=lambda: compiled("pipe", "data").as_text(),
    )
    assert not report.ok


def block(**together):
    return groups_of_block([(SIZES[axis], together.get(axis, False)) for axis in SIZES])


@pytest.mark.parametrize(
    "first,second,folded",
    [
        (block(data=True), block(pipe=True), block(data=True, pipe=True)),
        (block(data=True), block(model=True), block(data=True, model=True)),
        (block(data=True, model=True), block(pipe=True), block(data=True, model=True, pipe=True)),
        (block(data=True), block(data=True), None),
        (block(data=True, model=True), block(model=True), None),
        (block(data=True), groups_of_block([(4, True)]), None),
        (groups_of_block([(3, True), (4, False)]), groups_of_block([(2, False), (6, True)]), None),
    ],
)
def test_groups_of_two_sums(first, second, folded):
    assert fold_groups(first, second) == folded
    assert fold_groups(second, first) == folded
