"""What plans, meshes and schedules show in a notebook: all of it, and escaped."""

import jax
import pytest
from markup import Tags

import txcore as tx

EVIL = "<script>alert('&amp;')</script>"


def mesh(*axes, shape):
    count = 1
    for size in shape:
        count *= size
    return tx.MeshSpec(jax.devices()[:count], axes=axes, shape=shape)


def test_a_mesh_is_a_grid_of_positions():
    shown = Tags(mesh("data", "model", shape=(2, 3))._repr_html_())
    assert [tag for tag, _ in shown.found] == ["pre"]
    head, _, *grid = shown.text.splitlines()
    assert head == repr(mesh("data", "model", shape=(2, 3)))
    assert grid == [
        "        model 0  model 1  model 2",
        "data 0  0        1        2",
        "data 1  3        4        5",
    ]


def test_of_a_long_mesh_the_first_positions(monkeypatch):
    monkeypatch.setattr(tx.mesh, "_MOST_SHOWN", 2)
    *_, head, first, second, rest = Tags(mesh("a", "b", shape=(3, 2))._repr_html_()).text.split(
        "\n"
    )
    assert [head.split(), first.split(), second.split(), rest.split()] == [
        ["b", "0", "b", "1"],
        ["a", "0", "0", "1"],
        ["a", "1", "2", "3"],
        ["..."],
    ]
    one = Tags(mesh("a", shape=(4,))._repr_html_()).text.split("\n")
    assert [line.split() for line in one[2:]] == [["a", "0", "a", "1", "..."], ["0", "1"]]


def test_a_plan_is_its_options_one_a_line():
    plan = tx.Plan(data_parallel=tx.DP("data", shard="optimizer"), context="context")
    shown = Tags(plan._repr_html_())
    assert [tag for tag, _ in shown.found] == ["pre"]
    assert shown.text.splitlines() == [
        "Plan(",
        f"    data_parallel={plan.data_parallel!r},",
        "    context='context',",
        ")",
    ]


@pytest.mark.parametrize(
    "shown",
    [
        lambda: mesh(EVIL, shape=(2,)),
        lambda: tx.Plan(data_parallel=tx.DP(EVIL)),
        lambda: tx.Plan(data_parallel=tx.DP(EVIL)).describe(
            {EVIL: jax.numpy.ones(3)}, mesh(EVIL, shape=(2,))
        ),
    ],
    ids=["mesh", "plan", "description"],
)
def test_names_are_escaped(shown):
    markup = shown()._repr_html_()
    assert "<script" not in markup
    assert EVIL in Tags(markup).text


def test_a_schedule_is_drawn_with_its_text_below():
    schedule = tx.pipeline.make_schedule("1f1b", stages=2, microbatches=3)
    shown = Tags(schedule._repr_html_())
    assert [tag for tag, _ in shown.found if tag in ("svg", "pre")] == ["svg", "pre"]
    assert shown.text.endswith(str(schedule))
