"""The named shapes: what they are made of, what they count, and that all of them run."""

from typing import Any

import jax
import jax.numpy as jnp
import machine
import models
import numpy as np
import pytest

from txcore import kernels
from txcore.kernels.dispatch import registry, tuned
from txcore.kernels.tuning import measure, timing
from txcore.kernels.tuning.shapes import MAIN, OPS, SHAPES, Op, Shape

FLOAT = jnp.float32


def test_names_are_unique_and_ops_known():
    assert all(name == shape.name for name, shape in SHAPES.items())
    assert {shape.op for shape in SHAPES.values()} == set(OPS)
    assert set(MAIN) <= set(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_taken_by_its_op(name):
    shape = SHAPES[name]
    problem, able = measure.problem_of(shape, FLOAT)
    assert problem.shapes[0][0] == shape.shapes[0][0]
    assert registry.list_candidates(problem, able)[0].implementation == "xla"


@pytest.mark.parametrize("name", [name for name in SHAPES if "odd" in name])
def test_operands_are_what_their_shapes_say(name):
    operands = SHAPES[name].make_operands(jnp.bfloat16)
    wanted = SHAPES[name].make_structs(jnp.bfloat16)
    assert [(x.shape, x.dtype) for x in operands] == [(x.shape, x.dtype) for x in wanted]
    assert tuple(x.shape for x in operands) == SHAPES[name].shapes
    assert jax.tree.leaves(SHAPES[name].call_op(*operands))


@pytest.fixture(scope="module")
def named():
    return {measure.problem_of(shape, FLOAT)[0] for shape in SHAPES.values()}


@pytest.mark.parametrize("batch", [64, 256])
@pytest.mark.parametrize("model", models.MODELS)
def test_the_layers_of_the_mnist_models_are_all_there(model, batch, named):
    layers = models.layers_of(model)
    params = jax.eval_shape(lambda: models.init(layers, 0))
    images = jax.ShapeDtypeStruct((batch, *models.IMAGE), FLOAT)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    used = []
    with registry.decided_by(lambda problem, _: used.append(problem)):
        jax.eval_shape(
            lambda params, x, keys: models.apply(layers, params, x, keys), params, images, keys
        )
    assert len(used) >= len(params)
    assert set(used) <= named


def test_what_is_recorded_is_of_named_shapes_and_runs():
    recorded = tuned.read_recorded("cpu")
    asked = {}
    for dtype in {key.split("|")[2].partition(",")[0] for key in recorded}:
        for shape in SHAPES.values():
            problem, able = measure.problem_of(shape, dtype)
            asked[problem.key] = problem, able
    assert set(recorded) <= set(asked)
    for key, entry in recorded.items():
        choice = registry.choose_implementation(*asked[key], None)
        assert (choice.source, choice.implementation) == ("recorded", entry.implementation)


def test_the_cnn3x3_bucket_is_the_size_of_the_model():
    params = jax.tree.leaves(jax.eval_shape(lambda: models.init(models.layers_of("cnn3x3"), 0)))
    assert sorted(SHAPES["pack-cnn3x3"].shapes) == sorted(x.shape for x in params)
    size = sum(x.size for x in params)
    buckets = ("sgd-cnn3x3", "adamw-cnn3x3", "norm-cnn3x3", "unpack-cnn3x3")
    assert {SHAPES[name].shapes[0] for name in buckets} == {(size,)}


def test_operands_are_made_from_the_seed():
    for name in ("cnn3x3-conv1-b64", "loss-odd", "adamw-odd"):
        shape = SHAPES[name]
        first, same, other = (shape.make_operands(seed=seed) for seed in (1, 1, 2))
        assert all((a == b).all() for a, b in zip(first, same, strict=True))
        assert not any((a == b).all() for a, b in zip(first, other, strict=True))
    assert (shape.make_operands()[3] >= 0).all()
    logits, labels = SHAPES["loss-odd"].make_operands(jnp.bfloat16)
    assert (logits.dtype, labels.dtype) == (jnp.bfloat16, jnp.int32)
    assert 0 <= labels.min() <= labels.max() < 391
    assert np.unique(labels).size > 40


def test_counts_of_a_convolution_by_hand():
    # 64 images, 14 x 14 places, a 3 x 3 filter over 32 channels to 64.
    shape = SHAPES["cnn3x3-conv2-b64"]
    forward = 2 * 64 * 14 * 14 * 9 * 32 * 64
    assert shape.count_flops() == forward == 462_422_016
    assert shape.count_flops(backward=True) == 3 * forward
    images, filters, bias, pooled = 64 * 14 * 14 * 32, 9 * 32 * 64, 64, 64 * 7 * 7 * 64
    operands = 4 * (images + filters + bias)
    assert shape.count_bytes() == operands + 4 * pooled == 2_482_432
    assert shape.count_bytes(backward=True) == 2 * (operands + 4 * pooled) + operands
    assert shape.count_bytes(jnp.bfloat16) == shape.count_bytes() / 2


def test_counts_of_a_first_layer_by_hand():
    # 64 images of 784 numbers to 256 features; the images need no gradient.
    shape = SHAPES["mlp-dense1-b64"]
    assert shape.count_flops() == 2 * 64 * 784 * 256 == 25_690_112
    assert shape.count_flops(backward=True) == 2 * shape.count_flops()
    images, weights, bias, features = 64 * 784, 784 * 256, 256, 64 * 256
    assert shape.count_bytes() == 4 * (images + weights + bias + features)
    assert shape.count_bytes(backward=True) == 2 * shape.count_bytes() + 4 * (weights + bias)


def test_counts_without_padding_and_of_what_multiplies_nothing():
    # 7 images of 13 x 11, a 3 x 2 filter: 11 x 10 places; 3 channels to 5.
    assert SHAPES["conv-odd"].count_flops() == 2 * 7 * 11 * 10 * 3 * 2 * 3 * 5
    loss = SHAPES["loss-odd"]
    assert loss.count_flops(backward=True) == 0
    assert loss.count_bytes() == 4 * (61 * 391 + 61 + 61)
    # An update reads param, grad and velocity, and writes param and velocity: 20 bytes each.
    assert (
        SHAPES["sgd-10k"].count_bytes()
        == SHAPES["sgd-10k"].count_bytes(backward=True)
        == 20 * 10_000
    )
    assert SHAPES["adamw-10k"].count_bytes() == 28 * 10_000
    # A key is two 32-bit words; dropout reads and writes its elements.
    assert SHAPES["drop-odd"].count_bytes() == 2 * 4 * 7 * 13 * 11 + 7 * 8


class TestMeasure:
    @pytest.mark.parametrize("name", ["loss-odd", "unpack-odd", "norm-odd", "dense-odd-drop"])
    @pytest.mark.parametrize("backward", [False, True])
    def test_a_call_gives_the_op_s_results_and_its_gradients(self, name, backward):
        shape = SHAPES[name]
        operands = shape.make_operands()
        got: Any = measure.compile_call(shape, FLOAT, None, backward=backward)()
        want = shape.call_op(*operands)
        if backward and shape.differentiable:
            got, gradients = got
            assert len(gradients) == len(shape.differentiable)
            for place, gradient in zip(shape.differentiable, gradients, strict=True):
                assert gradient.shape == operands[place].shape
                assert jnp.abs(gradient).max() > 0
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)

    def test_an_update_goes_on_from_its_own_results(self):
        shape = SHAPES["sgd-odd"]
        call = measure.compile_call(shape, FLOAT, None, backward=True)
        for _ in range(3):
            call()

    def test_the_choice_runs_and_no_other(self, monkeypatch):
        ran = []

        def run(x, *, config):
            ran.append(config)
            return x

        only = {"xla": registry.Kernel(run, lambda problem: (None, "slow"))}
        op = Op(lambda x: registry.run_op("echo", only, x, implementation=None))
        monkeypatch.setitem(OPS, "echo", op)
        for config in (None, "slow"):
            choice = registry.Choice("xla", config, "given")
            measure.compile_call(Shape("one", "echo", ((3,),)), FLOAT, choice, backward=True)()
            assert set(ran) == {config}
            ran.clear()

    def test_rounds_alternate_and_medians_are_of_a_call(self, monkeypatch):
        now, order = [0.0], []

        def call(name, seconds):
            def run():
                now[0] += seconds * (100 if len(order) == 5 else 1)  # one round is disturbed
                order.append(name)

            return run

        monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
        times = timing.alternate_calls({"a": call("a", 1.0), "b": call("b", 2.0)}, rounds=3)
        assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]
        assert times == pytest.approx({"a": 1e6, "b": 2e6})

    def test_a_short_call_is_repeated(self, monkeypatch):
        now, count = [0.0], [0]

        def call():
            now[0] += 0.001
            count[0] += 1

        monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
        assert timing.alternate_calls({"a": call}, rounds=2) == pytest.approx({"a": 1000})
        assert count[0] == 1 + 2 * 10

    def test_what_fails_is_said_and_the_rest_is_measured(self, monkeypatch):
        compile_call = measure.compile_call

        def fail(shape, dtype, choice, *, backward, **options):
            if choice.implementation == "pallas_triton":
                raise RuntimeError("out of registers")
            return compile_call(shape, dtype, choice, backward=backward, **options)

        problem, _ = measure.problem_of(SHAPES["logits-b64"], FLOAT)
        two = {
            "xla": registry.Kernel(kernels.dense),
            "pallas_triton": registry.Kernel(kernels.dense),
        }
        monkeypatch.setattr(measure, "compile_call", fail)
        monkeypatch.setattr(measure, "problem_of", lambda shape, dtype: (problem, two))
        found = measure.measure_shape(SHAPES["logits-b64"], FLOAT, rounds=1, named=["pallas"])
        assert found.failed == {"pallas_triton": "RuntimeError: out of registers"}
        assert (dict(found.microseconds), found.entry) == ({}, None)

    @machine.cpu_only("an accelerator refuses what it would interpret")
    def test_an_interpreted_kernel_never_wins(self, monkeypatch):
        shape = SHAPES["logits-b64"]
        problem, able = measure.problem_of(shape, FLOAT)
        two = {name: registry.Kernel(able["xla"].run) for name in ("xla", "pallas_triton")}
        monkeypatch.setattr(measure, "problem_of", lambda shape, dtype: (problem, two))
        monkeypatch.setattr(measure, "compile_call", lambda *_, **__: lambda: None)
        monkeypatch.setattr(
            timing, "alternate_calls", lambda calls, rounds: dict.fromkeys(calls, 1.0)
        )
        assert list(measure.measure_shape(shape, FLOAT).microseconds) == ["xla"]
        both = measure.measure_shape(shape, FLOAT, named=["xla", "pallas"])
        assert list(both.microseconds) == ["xla", "pallas_triton"]
        assert both.entry.implementation == "xla"
        assert measure.measure_shape(shape, FLOAT, named=["pallas"]).entry is None
