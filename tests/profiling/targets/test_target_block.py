"""A sharded transformer's training step, and its automatic twin, on machines that are not here."""

import inspect
from collections import Counter

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import transformer_block as block
from audit_cases import P, mesh_of, shape
from jax.sharding import NamedSharding
from target_cases import available

from txcore.profiling import audit

SIZES = block.Sizes(
    layers=12, batch=2, sequence=256, features=1024, heads=16, head=64, hidden=4096, vocabulary=8192
)
MESHES = {
    "cpu:8": {"data": 2, "model": 4},
    "cuda:h100:8": {"data": 2, "model": 4},
    "cuda:h100:64x8": {"data": 64, "model": 8},
    "tpu:v5e:16x16": {"data": 32, "model": 8},
    "tpu:v5p:16x16x16": {"data": 512, "model": 8},
}
CUBE = {"pod": 2, "data": 2, "model": 2}


def counted_by_hand(s, mesh):
    """Return the payload of one execution by kind, axes, dtype and trips: S as in nccl-tests."""
    data, model, pods = mesh["data"], mesh["model"], mesh.get("pod", 1)
    sequence = 2 * s.batch * s.sequence * s.features  # all of it, in bfloat16
    tokens = 4 * s.batch * s.sequence
    heads, hidden, words = s.heads // model, s.hidden // model, s.vocabulary // model
    of_a_layer = s.features * (3 * heads * s.head + heads * s.head + hidden + hidden)
    weights = 4 * (s.layers * of_a_layer + words * s.features)
    scales = 4 * s.features * (2 * s.layers + 1)
    shards = ("pod", "data") if pods > 1 else ("data",)
    counted = {
        # The attention's and the MLP's pair, and the transposes of both.
        ("all-gather", ("model",), "bfloat16", s.layers): 4 * sequence,
        ("reduce-scatter", ("model",), "bfloat16", s.layers): 4 * sequence,
        ("all-gather", ("model",), "bfloat16", 1): sequence,
        ("reduce-scatter", ("model",), "bfloat16", 1): sequence,
        # The largest logit of each token, the sum of exponentials, the label's logit.
        ("all-reduce", ("model",), "float32", 1): 3 * tokens,
        ("reduce-scatter", ("data",), "float32", 1): weights,
        ("all-gather", ("data",), "float32", 1): weights,
        ("all-reduce", (*shards, "model"), "float32", 1): scales,
        ("all-reduce", shards, "float32", 1): 4,  # the loss
    }
    if pods > 1:
        counted["all-reduce", ("pod",), "float32", 1] = weights // data
    return counted


def found_in(report):
    """Return what `counted_by_hand` does, from the compiled program."""
    found = Counter()
    for c in report.collectives:
        for part in c.parts:
            # XLA for TPU sends some scatters as sums, of the same payload.
            is_sum_of_scatter = report.target.startswith("tpu") and "rewritten" in part.fates
            kind = "reduce-scatter" if is_sum_of_scatter else c.kind
            found[kind, c.axes, part.dtype, c.trips] += part.payload_bytes
    return dict(found)


def lines_of(*functions):
    """Return "file.py:12" of every line of functions."""
    sources = [
        (f.__code__.co_filename.split("/")[-1], inspect.getsourcelines(f)) for f in functions
    ]
    return {f"{name}:{first + i}" for name, (lines, first) in sources for i in range(len(lines))}


EXPLICIT = lines_of(
    block.layer, block.cross_entropy, block.local_loss, block.sync, block.gather_update, block.build
)
TWIN = lines_of(
    *(block.norm, block.attention, block.mlp, block.logits_of, block.whole_loss, block.whole_step)
)


def check_explicit(report, mesh):
    assert report.ok, report
    found = found_in(report)
    assert found == counted_by_hand(SIZES, mesh)
    assert report.payload_bytes == sum(size * key[-1] for key, size in found.items())
    assert {part.source for c in report.collectives for part in c.parts} <= EXPLICIT


@pytest.mark.parametrize("target", MESHES)
def test_the_block(target):
    report = audit(block.build(SIZES), target=available(target), mesh=MESHES[target])
    assert report.exact, report
    assert (report.target, dict(report.mesh)) == (target, MESHES[target])
    check_explicit(report, MESHES[target])
    # Half and half: 8 of a layer, 2 of the head, 2 sums; 5 weights twice, 2 scales, loss, maximum.
    assert Counter(bool(f.declared.tag) for f in report.fates) == {True: 12, False: 14}


def test_the_block_with_plain_jax_inside_the_loss():
    mesh = MESHES["cpu:8"]
    report = audit(block.build(SIZES, plain_mlp=True), target="cpu:8", mesh=mesh)
    check_explicit(report, mesh)
    assert not report.exact, "autodiff made the transposes"
    made = [(c.kind, c.trips) for c in report.collectives if c.origin == "autodiff"]
    assert sorted(made) == [("all-gather", SIZES.layers), ("reduce-scatter", SIZES.layers)]


def test_the_block_over_three_axes():
    report = audit(block.build(SIZES), target="cpu:8", mesh=CUBE)
    assert report.exact, report
    check_explicit(report, CUBE)


@pytest.mark.parametrize("target", MESHES)
def test_the_block_s_automatic_twin(target):
    report = audit(block.build_twin(SIZES), target=available(target), mesh=MESHES[target])
    assert not report.ok
    # Updates gathered for the results' sharding: jax 0.10 calls that the edge of the program.
    assert {c.origin for c in report.unexplained} - {"boundary"} == {"partitioner"}
    assert report.unexplained == report.collectives
    assert {c.source for c in report.unexplained} <= TWIN
    # At least the heads' and the hidden features' sums of each layer, and the gradients.
    assert sum(c.trips == SIZES.layers for c in report.unexplained) >= 4
    assert {"data", "model"} <= {axis for c in report.unexplained for axis in c.axes}


def mnist_loss(params, batch):
    logits = models.apply(models.layers_of("mlp"), params, batch["image"])
    label = jnp.take_along_axis(logits, batch["label"][:, None], 1)[:, 0]
    return (jax.nn.logsumexp(logits, 1) - label).mean()


def mnist_step(params, momentum, batch):
    loss, grads = jax.value_and_grad(mnist_loss)(params, batch)
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
    return jax.tree.map(lambda p, m: p - 0.1 * m, params, momentum), momentum, loss


def build_mnist_twin(mesh):
    rows = 32 * mesh.size
    params = jax.eval_shape(lambda: models.init(models.layers_of("mlp"), 0))
    params = jax.tree.map(lambda p: shape(mesh, P(), *p.shape), params)
    image = shape(mesh, P("data"), rows, *models.IMAGE)
    batch = {"image": image, "label": shape(mesh, P("data"), rows, dtype=jnp.int32)}
    step = jax.jit(mnist_step, out_shardings=NamedSharding(mesh, P()))
    return step, (params, params, batch)


@pytest.mark.parametrize("target", MESHES)
def test_the_mnist_step_s_automatic_twin(target):
    mesh = {"data": np.prod(list(MESHES[target].values())).item()}
    report = audit(build_mnist_twin, target=available(target), mesh=mesh)
    assert not report.ok
    assert {(c.kind, c.axes, c.origin) for c in report.unexplained} == {
        ("all-reduce", ("data",), "partitioner")
    }
    assert {c.source for c in report.unexplained} <= lines_of(
        mnist_loss, mnist_step, models.apply, models._dense
    )
    leaves = jax.tree.leaves(models.init(models.layers_of("mlp"), 0))
    assert report.payload_bytes == sum(leaf.nbytes for leaf in leaves) + 4


SMALL = block.Sizes(
    layers=3, batch=2, sequence=8, features=8, heads=4, head=4, hidden=16, vocabulary=12,
    dtype="float32",
)  # fmt: skip


def random_arguments(shards):
    rng = np.random.default_rng(0)

    def draw(scale):
        return {name: scale * rng.standard_normal(d) for name, d in block.dims_of(SMALL).items()}

    rows = shards * SMALL.batch, SMALL.sequence
    x = rng.standard_normal((*rows, SMALL.features))
    return draw(0.5), draw(0.1), {"x": x, "labels": rng.integers(0, SMALL.vocabulary, rows)}


def numpy_loss(params, batch):
    """Compute the loss in float64, example by example and head by head."""

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    losses = []
    for x, labels in zip(batch["x"], batch["labels"], strict=True):
        for i in range(SMALL.layers):
            h, added = norm(x, params["scales"][i, 0]), 0
            for n in range(SMALL.heads):
                q, k, v = (h @ params["qkv"][i, :, c, n] for c in range(3))
                scores = q @ k.T / np.sqrt(SMALL.head)
                scores[np.triu_indices(len(x), 1)] = -np.inf
                added = added + softmax(scores) @ v @ params["out"][i, :, n].T
            x = x + added
            h = norm(x, params["scales"][i, 1]) @ params["up"][i]
            gelu = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
            x = x + gelu @ params["down"][i].T
        chances = softmax(norm(x, params["scale"]) @ params["head"].T)
        losses += list(-np.log(chances[np.arange(len(x)), labels]))
    return np.mean(losses)


@pytest.mark.parametrize(
    "axes, plain_mlp",
    [({"data": 2, "model": 4}, False), (CUBE, True)],
    ids=["two axes", "three axes, plain jax"],
)
def test_the_block_computes_the_whole_model_s_gradients(axes, plain_mlp):
    mesh = mesh_of(**axes)
    given = random_arguments(mesh.size // axes["model"])
    fn, shapes = block.build(SMALL, plain_mlp=plain_mlp)(mesh)
    placed = jax.tree.map(lambda x, s: jax.device_put(x.astype(s.dtype), s.sharding), given, shapes)
    params, momentum, loss = jax.tree.map(np.asarray, jax.jit(fn)(*placed))
    whole = jax.tree.map(lambda x, s: x.astype(s.dtype), given, shapes)
    expected = jax.jit(block.whole_step)(*whole)
    jax.tree.map(
        lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5),
        (params, momentum, loss),
        expected,
    )

    before, old_momentum, batch = given
    assert loss == pytest.approx(numpy_loss(before, batch), rel=1e-5)
    rng = np.random.default_rng(1)
    for name in before:
        gradient = momentum[name] - block.DECAY * old_momentum[name]
        along = rng.standard_normal(gradient.shape)
        ahead, behind = (
            numpy_loss(before | {name: before[name] + step * along}, batch)
            for step in (1e-4, -1e-4)
        )
        slope = (ahead - behind) / 2e-4
        assert (gradient * along).sum() == pytest.approx(slope, rel=1e-3, abs=1e-4), name
        updated = before[name] - block.LEARNING_RATE * momentum[name]
        np.testing.assert_allclose(params[name], updated, rtol=1e-5, atol=1e-6)
