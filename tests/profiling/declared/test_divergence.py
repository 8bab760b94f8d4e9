"""What hangs or lies under a cond or while whose predicate differs is found; the rest is not."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from audit_cases import P, mesh_of, on, tag, vary
from jax import lax

from txcore.profiling import Report
from txcore.profiling.declared.divergence import Divergence, find_divergences

HERE = pathlib.Path(__file__).name


ROWS = P("data")


def found_in(body, out_specs=ROWS, **options):
    """What is found in a body that is given (2, 4) of (8, 4) rows on a mesh data=4, model=2."""
    fn = on(mesh_of(data=4, model=2), ROWS, out_specs, **options)(body)
    return find_divergences(jax.jit(fn).trace(jnp.ones((8, 4))).jaxpr)


def first():
    return lax.axis_index("data") == 0


def psum(x, axis="data"):
    return vary(lax.psum(vary(x, axis), axis), "data")


def permute(x, axis="data"):
    return lax.ppermute(x, axis, [(0, 1), (1, 0)])


def permute_model(x):
    return lax.ppermute(x, "model", [(0, 1)])


def keep(x):
    return x


def loop_while(test, step, start):
    return lax.while_loop(test, step, start)


@jax.custom_vjp
def doubled(x):
    return lax.cond(first(), psum, keep, x)


doubled.defvjp(lambda x: (doubled(x), None), lambda _, g: (2 * g,))


def scan(step, x):
    return lax.scan(lambda c, _: (step(c), None), x, None, length=3)[0]


def through_a_ref(x):
    ref = jax.new_ref(vary(jnp.zeros(()), "data"))
    ref[...] = x.sum()
    return ref[...]


def called_back(x):
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct((), jnp.float32), x)


HANGS = {
    "psum by the index": lambda x: lax.cond(first(), psum, keep, x),
    "psum by the data": lambda x: lax.cond(x.sum() > 0, psum, keep, x),
    "pmax in a switch": lambda x: lax.switch(
        lax.axis_index("data"),
        [keep, keep, keep, lambda v: vary(lax.pmax(v, "data"), "data")], x),
    "all_gather": lambda x: lax.cond(
        first(), lambda v: lax.all_gather(v, "data").sum(0), keep, x),
    "reduce_scatter": lambda x: lax.cond(
        first(), lambda v: v * lax.psum_scatter(v.sum(0), "data"), keep, x),
    "all_to_all": lambda x: lax.cond(
        first(), lambda v: lax.all_to_all(v, "data", 1, 1, tiled=True), keep, x),
    "ppermute": lambda x: lax.cond(first(), permute, keep, x),
    "over both axes": lambda x: lax.cond(
        first(), lambda v: vary(lax.psum(vary(v, "model"), ("model", "data")), "data"), keep, x),
    "in a while's body": lambda x: loop_while(lambda c: c.sum() < 9, lambda c: psum(c) + 1, x),
    "in a while's predicate": lambda x: loop_while(
        lambda c: (psum(c) * c).sum() < 9, lambda c: c + 1, x),
    "by a carry that comes to differ": lambda x: loop_while(
        lambda s: s[0] < 9, lambda s: (s[0] + s[1].sum(), psum(s[1])), (vary(0.0, "data"), x))[1],
    "in a scan in a cond": lambda x: lax.cond(first(), lambda v: scan(psum, v), keep, x),
    "in a cond in a scan": lambda x: scan(lambda c: lax.cond(c.sum() > 0, psum, keep, c), x),
    "in an inner cond that is alike": lambda x: lax.cond(
        first(), lambda v: lax.cond(psum(v).sum() > 0, lambda w: w * 2, keep, v), keep, x),
    "under jit": lambda x: lax.cond(first(), jax.jit(psum), keep, x),
    "a cond under jit": jax.jit(lambda x: lax.cond(first(), psum, keep, x)),
    "under remat": lambda x: lax.cond(first(), jax.checkpoint(psum), keep, x),
    "in a custom_vjp": doubled,
    "by a permuted value": lambda x: lax.cond(
        permute(psum(x)).sum() > 0, psum, keep, x),
    "by a mutable array": lambda x: lax.cond(through_a_ref(x) > 0, psum, keep, x),
    "by a scattered value": lambda x: lax.cond(
        jnp.zeros(4).at[lax.axis_index("data")].set(1)[0] > 0, psum, keep, x),
}  # fmt: skip

RIGHT = {
    "nothing inside": lambda x: lax.cond(first(), lambda v: v * 2, keep, x),
    "psum along another axis": lambda x: lax.cond(first(), lambda v: psum(v, "model"), keep, x),
    "all_gather along another axis": lambda x: lax.cond(
        first(), lambda v: psum(lax.all_gather(vary(v, "model"), "model")[0], "model"), keep, x),
    "by a sum": lambda x: lax.cond(psum(x).sum() > 0, psum, keep, x),
    "by a sum that was cast": lambda x: lax.cond(vary(psum(x).sum(), "data") > 0, permute, keep, x),
    "by a gathered value": lambda x: lax.cond(
        lax.all_gather(x, "data").sum() > 0, psum, keep, x),
    "by another axis' index": lambda x: lax.cond(
        lax.axis_index("model") == 0, lambda v: vary(psum(v), "model"),
        lambda v: vary(v, "model"), x),
    "selected, not branched": lambda x: jnp.where(first(), psum(x), x),
    "a loop by a sum": lambda x: loop_while(
        lambda s: s[0] < 9, lambda s: (s[0] + psum(s[1]).sum(), psum(s[1])),
        (vary(0.0, "data"), x))[1],
    "a loop by a counter": lambda x: loop_while(
        lambda s: s[0] < 3, lambda s: (s[0] + 1, psum(s[1])), (0, x))[1],
    "beside": lambda x: psum(lax.cond(first(), lambda v: v * 2, keep, x)),
    "a counter that nobody reads": lambda x: lax.fori_loop(
        0, lax.axis_index("data"), lambda i, c: c * 2, x),
    "by a scatter's result": lambda x: lax.cond(
        jnp.zeros(4).at[1].add(psum(x).sum())[0] > 0, psum, keep, x),
    "by a solution": lambda x: lax.cond(
        jnp.linalg.solve(jnp.eye(2), jnp.ones(2))[0] > 0, psum, keep, x),
    "by a callback on a sum": lambda x: lax.cond(
        called_back(lax.psum(x.sum(), "data")) > 0, psum, keep, x),
    "dead code": lambda x: (lax.cond(first(), psum, keep, x), x)[1],
}  # fmt: skip


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", HANGS)
def test_hangs(name, check_vma):
    found = found_in(HANGS[name], check_vma=check_vma)
    assert {(d.problem, d.axis) for d in found} == {("hangs", "data")}
    assert all(d.source.startswith(HERE) and d.control_source.startswith(HERE) for d in found)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", RIGHT)
def test_right(name, check_vma):
    out_specs = P(("data", "model")) if name == "by another axis' index" else P("data")
    assert found_in(RIGHT[name], out_specs, check_vma=check_vma) == ()


def test_a_permute_joins_all_devices_so_that_any_axis_counts():
    body = lambda x: lax.cond(first(), lambda v: permute(v, "model"), keep, x)  # noqa: E731
    (found,) = found_in(body, check_vma=False)
    assert (found.problem, found.kind, found.axes) == ("hangs", "collective-permute", ("model",))
    assert found.axis == "data"


def test_each_axis_of_the_predicate_is_named():
    def body(x):
        index = lax.axis_index(("data", "model"))
        return lax.cond(index == 0, lambda v: lax.psum(v, ("data", "model")), keep, x)

    assert {d.axis for d in found_in(body, check_vma=False)} == {"data", "model"}


def test_tag_and_both_lines_are_named():
    def total(x):
        with tag("psum/total"):
            return vary(lax.psum(x, "data"), "data")

    def body(x):
        return lax.cond(first(), lambda v: scan(total, v), keep, x)

    (found,) = found_in(body)
    line, control = total.__code__.co_firstlineno + 2, body.__code__.co_firstlineno + 1
    assert found == Divergence(
        *("hangs", "data", "psum/total", "all-reduce", ("data",)),
        *(f"{HERE}:{line}", "cond", f"{HERE}:{control}"),
    )
    assert str(found) == (
        f"psum/total over data at {HERE}:{line} inside the cond at {HERE}:{control}, whose "
        "predicate differs along axis 'data'"
    )


def test_what_autodiff_puts_into_a_branch():
    """A branch uses a parameter that is the same everywhere: its gradient is summed in there."""

    def body(x):
        def loss(w):
            return lax.cond(first(), lambda v: (v * w).sum(), lambda v: v.sum(), x)

        return jax.grad(loss)(jnp.float32(3.0)) + 0 * x

    found = {(d.problem, d.kind) for d in found_in(body)}
    assert found == {("hangs", "all-reduce"), ("lies", "cond")}


def nested(inner):
    """A shard_map over model inside one over data."""
    return lambda x: jax.shard_map(
        inner, in_specs=P(None, "model"), out_specs=P(None, "model"), axis_names={"model"}
    )(x)


@pytest.mark.parametrize("check_vma", [True, False])
def test_nested_shard_maps(check_vma):
    by_data = lambda x: lax.cond(x.sum() > 0, permute_model, keep, x)  # noqa: E731
    by_model = lambda x: lax.cond(  # noqa: E731
        lax.axis_index("model") == 0, lambda v: vary(lax.psum(v, "model"), "model"), keep, x
    )
    outer = lambda x: lax.cond(x[0, 0] > 0, nested(permute_model), keep, x)  # noqa: E731
    options = {"axis_names": {"data"}, "check_vma": check_vma}
    assert {d.axis for d in found_in(nested(by_data), **options)} == {"data", "model"}
    assert {d.axis for d in found_in(nested(by_model), **options)} == {"model"}
    assert {d.axis for d in found_in(outer, **options)} == {"data"}


def chosen(w):
    return lax.cond(first(), lambda v: 2 * v, lambda v: 3 * v, w)


def doubled_by_index(w):
    below = lambda s: s[0] < lax.axis_index("data")  # noqa: E731
    return loop_while(below, lambda s: (s[0] + 1, 2 * s[1]), (0, w))[1]


def counted(w):
    return loop_while(lambda c: c < lax.axis_index("data"), lambda c: c + 1, w)


@pytest.mark.parametrize("body", [chosen, doubled_by_index, counted])
def test_lies(body):
    """All three versions of jax type these as the same on every device, and let them out."""
    (found,) = found_in(lambda x: body(1.0), P())
    assert (found.problem, found.axis) == ("lies", "data")
    assert found.name == found.control == ("cond" if body is chosen else "while")
    assert str(found).endswith(
        "is typed as the same along axis 'data', along which its predicate differs"
    )
    # Cast first, it is right; and without varying types nothing is said that could be false.
    assert found_in(lambda x: vary(body(vary(1.0, "data")), "data")[None]) == ()
    assert found_in(lambda x: jnp.float32(body(1.0))[None], check_vma=False) == ()


def test_a_lie_makes_gradients_wrong():
    """Why it is refused: the gradient of sum(2w, 3w, 3w, 3w) is 11, and jax gives 8."""

    def gradient(cast):
        def body(w):
            total = lambda w: lax.psum(vary(chosen(cast(w)), "data"), "data")  # noqa: E731
            return jax.grad(total)(w)

        return float(jax.jit(on(mesh_of(data=4, model=2), P(), P())(body))(1.0))

    assert gradient(lambda w: vary(w, "data")) == 11
    assert gradient(keep) != 11


def test_what_every_branch_hands_on_is_no_lie():
    def body(x):
        w = x.sum() * 0 + 1
        kept, zero, _ = lax.cond(
            first(), lambda w, v: (w, 0.0, v * 2), lambda w, v: (w, 0.0, v), jnp.ones(()), x
        )
        carried = loop_while(
            lambda s: s[1].sum() < 9, lambda s: (s[0], s[1] + 1), (jnp.ones(()), x)
        )[0]
        return lax.pmax(x, "data").sum() + kept + zero + carried + 0 * lax.pmax(w, "data")

    assert found_in(body, P()) == ()


def test_along_an_axis_of_one_device_everybody_agrees():
    mesh = mesh_of(data=1, model=8)
    body = lambda x: lax.cond(x.sum() > 0, lambda v: lax.psum(v, "data"), keep, x)  # noqa: E731
    fn = on(mesh, P("data"), P(), check_vma=False)(body)
    assert find_divergences(jax.make_jaxpr(fn)(jnp.ones((8, 4)))) == ()


def test_a_program_without_shard_map():
    assert (
        find_divergences(jax.make_jaxpr(lambda x: lax.cond(x > 0, jnp.sin, jnp.cos, x))(1.0)) == ()
    )


STUCK = """
import sys
import jax
import numpy as np
from jax import lax
jax.config.update("jax_num_cpu_devices", 4)
P = jax.sharding.PartitionSpec
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
inside = {
    "psum": lambda v: lax.psum(v, "data"),
    "ppermute": lambda v: lax.ppermute(v, "model", [(0, 1), (1, 0)]),
    "psum along another axis": lambda v: lax.psum(v, "model"),
}[sys.argv[1]]
body = lambda x: lax.cond(lax.axis_index("data") == 0, inside, lambda v: v, x)
spec = P(("data", "model"))
f = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
print(np.asarray(jax.jit(f)(np.arange(4.0))).tolist())
"""


@pytest.mark.parametrize("inside", ["psum", "ppermute", "psum along another axis"])
def test_it_really_hangs(inside):
    """XLA's CPU client ends the process when a device is missed for two seconds."""
    hangs = inside != "psum along another axis"
    flags = "--xla_cpu_collective_call_{}_timeout_seconds={}"
    limits = [("warn_stuck", 1), ("terminate", 2 if hangs else 60)]
    flags = " ".join(flags.format(*limit) for limit in limits)
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", STUCK, inside]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    if hangs:
        assert ran.returncode != 0
        assert "Termination timeout" in ran.stderr
    else:
        assert (ran.returncode, ran.stdout) == (0, "[1.0, 1.0, 2.0, 3.0]\n")


def test_a_report_that_diverges_is_not_ok_and_says_so():
    hangs = Divergence(
        *("hangs", "data", "psum/total", "all-reduce", ("data",), "a.py:3", "while", "a.py:1")
    )
    lies = Divergence("lies", "data", "cond", "cond", (), "a.py:9", "cond", "a.py:9")
    report = Report((), divergent=(hangs, lies))
    assert not report.ok
    assert report.verdict() == (
        "failed: 1 that not all devices reach: psum/total over data at a.py:3 inside the "
        "while at a.py:1, whose predicate differs along axis 'data'; 1 of a false type: an output "
        "of the cond at a.py:9 is typed as the same along axis 'data', along which its predicate "
        "differs"
    )
    assert [d["problem"] for d in json.loads(report.to_json())["divergent"]] == ["hangs", "lies"]
