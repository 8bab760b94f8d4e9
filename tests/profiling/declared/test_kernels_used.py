"""The audit names the kernels of a program, and counts calls, not operations."""

import json

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import train
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore import kernels
from txcore.profiling import audit, audit_text
from txcore.profiling.declared.kernels import KernelUse, kernels_in_text, kernels_used

W, B, X = jnp.eye(4), jnp.zeros(4), jnp.ones((2, 4))


def dense(x, w=W):
    return kernels.dense(x, w, B, activation="relu", implementation="xla")


def two(x, w=W):
    return dense(dense(x, w), w)  # one right after the other, from one line


def used(function, *args):
    return {u.name: u.calls for u in kernels_used(jax.jit(function).trace(*args).jaxpr)}


def loss(function):
    return lambda w, x: function(x, w).sum()


PROGRAMS = {
    "forward": (lambda w, x: two(x, w), 2),
    "without jit": (lambda w, x: two(x, w) + dense(x, w), 3),
    "a gradient with its value": (jax.value_and_grad(loss(two)), 2),
    "a gradient alone": (jax.grad(loss(two)), 2),
    "all gradients": (jax.grad(loss(two), (0, 1)), 2),
    "remat": (jax.grad(loss(jax.checkpoint(two))), 2),
    "remat with its value": (jax.value_and_grad(loss(jax.checkpoint(two))), 4),  # and 2 again
    "remat of the second": (jax.grad(loss(lambda x, w: jax.checkpoint(dense)(dense(x, w), w))), 2),
    "vmap": (lambda w, x: jax.vmap(lambda row: two(row, w))(x), 2),
    "vmap of a gradient": (
        lambda w, x: jax.vmap(lambda row: jax.grad(loss(two))(w, row))(x),
        2,
    ),
    "a loop": (lambda w, x: lax.scan(lambda c, _: (two(c, w), None), x, None, 5)[0], 2),
    "the gradient of a loop": (
        jax.grad(loss(lambda x, w: lax.scan(lambda c, _: (two(c, w), None), x, None, 5)[0])),
        2,
    ),
    "a loop of gradients": (
        lambda w, x: lax.fori_loop(0, 3, lambda i, w: w - jax.grad(loss(two))(w, x), w),
        2,
    ),
    "both branches": (lambda w, x: lax.cond(x[0, 0] > 0, two, dense, x, w), 3),
    "a function called twice": (lambda w, x: jax.jit(dense)(jax.jit(dense)(x, w), w), 2),
    "nothing of it is used": (lambda w, x: (two(x, w), 0)[1] + x, None),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_calls_are_counted(name):
    function, calls = PROGRAMS[name]
    assert used(function, W, X) == ({} if calls is None else {"dense.xla": calls})


@pytest.mark.parametrize("checked", [True, False])
def test_in_shard_map(checked):
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))

    def gradient(x, w):
        return lax.psum(jax.grad(loss(two))(lax.pcast(w, "data", to="varying"), x), "data")

    mapped = jax.shard_map(
        gradient, mesh=mesh, in_specs=(P("data"), P()), out_specs=P(), check_vma=checked
    )
    report = audit(mapped, X, W)
    assert report.kernels == (KernelUse("dense.xla", 2),)
    assert report.ok
    table, kernels_line, verdict = str(report).rsplit("\n", 2)
    assert "all-reduce" in table
    assert kernels_line == "kernels: dense.xla x2"
    assert verdict == report.verdict()


def test_the_proof_of_the_mnist_step_names_its_kernels(tmp_path):
    layers = models.layers_of("cnn3x3", dropout=0)
    engine = tx.Engine(
        mesh=tx.MeshSpec(jax.devices()[:2]),
        plan=tx.Plan(data_parallel=tx.DP("data")),
        optimizer=tx.optim.sgd(0.02, momentum=0.9),
    )
    step, _ = train.make_steps(layers)
    batch = {
        "image": np.zeros((4, 28, 28, 1), np.float32),
        "label": np.zeros(4, np.int32),
        "weight": np.ones(4, np.float32),
    }
    report = engine.audit(step, engine.create_state(models.init(layers, seed=0)), batch)
    counted = {use.name: use.calls for use in report.kernels}
    layers_and_loss = {"conv2d.xla": 2, "dense.xla": 2, "cross_entropy.xla": 1}
    assert counted.items() >= layers_and_loss.items()
    assert {name.partition(".")[0] for name in {*counted} - {*layers_and_loss}} <= {"sgd_momentum"}
    assert report.exact
    assert json.loads(report.to_json())["kernels"][0] == {"name": "conv2d.xla", "calls": 2}
    report.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<dt>Kernels</dt><dd>conv2d.xla x2, dense.xla x2, cross_entropy.xla x1" in page


def test_evaluation_calls_each_layer_once():
    layers = models.layers_of("cnn")
    params = jax.eval_shape(lambda: models.init(layers, 0))
    images = jax.ShapeDtypeStruct((2, *models.IMAGE), jnp.float32)
    found = used(lambda params, x: models.apply(layers, params, x), params, images)
    assert found == {"conv2d.xla": 2, "dense.xla": 2}


class TestText:
    def test_a_compiled_program_alone_lists_and_does_not_count(self):
        compiled = jax.jit(jax.grad(loss(two))).lower(W, X).compile()
        want = (KernelUse("dense.xla", None),)
        assert audit(compiled).kernels == audit_text(compiled.as_text()).kernels == want
        assert "kernels: dense.xla\n" in str(audit(compiled))

    @pytest.mark.parametrize(
        "path, names",
        {
            "jit(f)/kernel.conv2d.xla/add": ["conv2d.xla"],
            "jit(f)/transpose(jvp(kernel.dense.pallas))/dot": ["dense.pallas"],
            "vmap(transpose(jvp(kernel.a.xla)))/mul": ["a.xla"],
            "a/kernel.b.xla/while/body/kernel.c.triton": ["b.xla", "c.triton"],
            "jit(f)/my_kernel.dense.xla/add": [],
            "jit(f)/kernel.dense/add": [],
            "jit(f)/kernel.dense.xla.more/add": [],
            "": [],
        }.items(),
    )
    def test_the_forms_of_a_name(self, path, names):
        found = kernels_in_text(f'metadata={{op_name="{path}"}}')
        assert [use.name for use in found] == names


def test_a_user_s_own_names_are_none_of_ours():
    named = {"a": "residual", "b": "kernel.", "c": "kernel.x.y.z", "d": "my kernel.x.y"}
    assert used(lambda x: sum(checkpoint_name(x, name) for name in named.values()), X) == {}


def test_a_program_without_kernels_says_nothing_of_them(tmp_path):
    report = audit(jnp.sin, X)
    assert str(report) == report.verdict()
    assert json.loads(report.to_json())["kernels"] == []
    report.to_html(tmp_path / "page.html")
    assert "<dt>Kernels</dt>" not in (tmp_path / "page.html").read_text()
