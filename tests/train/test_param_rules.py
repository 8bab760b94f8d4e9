"""Rules that say which parameters are stored in parts: what they mean, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import split_models as models
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore.layout import Layout, drop_axes, mirrored_specs


def spec_of(layouts):
    return jax.tree.map(lambda layout: layout.stored, layouts)


def test_the_first_rule_that_matches_counts():
    params = {"layers": [{"w": np.zeros((4, 8)), "b": np.zeros(8)} for _ in range(2)]}
    rules = {"layers/0/w": P("model", None), "layers/*/w": P(None, "model"), "*/b": P("model")}
    layouts = models.plan(rules).layouts(params, models.mesh(2, 4))
    assert spec_of(layouts) == {
        "layers": [
            {"w": P("model", None), "b": P("model")},
            {"w": P(None, "model"), "b": P("model")},
        ]
    }
    assert {layout.reduced for layout in jax.tree.leaves(layouts)} == {("data",)}


def test_what_no_rule_matches_is_whole():
    layouts = models.plan().layouts(models.params(), models.mesh(2, 2))
    assert layouts["b2"] == Layout(P(), P(), ("data",))
    assert layouts["mlp"]["b1"] == Layout(P("model"), P("model"), ("data",))


def test_axes_of_one_device_are_left_out():
    layouts = models.plan().layouts(models.params(), models.mesh(1, 1))
    for layout in jax.tree.leaves(layouts):
        assert (layout.stored_axes, layout.norm_axes, layout.reduced) == ((), (), ())


def test_a_single_array_and_keys_of_any_kind():
    assert models.plan({"*": P("model")}).layouts(np.zeros(8), models.mesh(1, 2)).stored_axes
    pair = (np.zeros(8), {"a.b": np.zeros(4)})
    layouts = models.plan({"1/a.b": P("model")}).layouts(pair, models.mesh(1, 2))
    assert [layout.stored_axes for layout in jax.tree.leaves(layouts)] == [(), ("model",)]


def test_drop_axes():
    spec = P(("a", "b"), None, "a", ("b", "c"))
    assert drop_axes(spec, frozenset("a")) == P("b", None, None, ("b", "c"))


W1, B1 = "params['mlp']['w1']", "params['mlp']['b1']"
REFUSED = {
    "an unknown axis": (
        {"mlp/w1": P(None, "modle")},
        "Plan(params={'mlp/w1': ...}) needs mesh axis 'modle', but the mesh's axes are 'data', "
        "'model': use one of them, or name the axis in MeshSpec(axes=...)",
    ),
    "an indivisible dim": (
        {"mlp/w1": P("model", None)},
        f"Plan(params={{'mlp/w1': P('model', None)}}) needs dim 0 of {W1}, shape (6, 8), divisible "
        "by the 4 devices along 'model': make it 8, split another dim, or use fewer devices",
    ),
    "more dims than the parameter has": (
        {"mlp/*1": P(None, "model")},
        f"Plan(params={{'mlp/*1': P(None, 'model')}}) needs at least 2 dims, but {B1} has shape "
        "(8,): give one entry for each dim, or name that parameter in a rule before it",
    ),
    "a rule that matches nothing": (
        {"mlp/w3": P("model")},
        "Plan(params={'mlp/w3': P('model')}) needs a parameter that it matches, but they are 'b2', "
        "'mlp/b1', 'mlp/w1', 'mlp/w2', 'scale': write the whole path, with * for any characters, "
        "or remove the rule",
    ),
    "a path without its beginning": (
        {"w1": P(None, "model")},
        "Plan(params={'w1': P(None, 'model')}) needs a parameter that it matches, but they are ",
    ),
    "a rule behind a wider one": (
        {"mlp/*": P("model"), "mlp/w2": P("model", None)},
        "Plan(params={'mlp/w2': P('model', None)}) needs a parameter of its own, but the first "
        "rule that matches counts, and 'mlp/w2' goes to 'mlp/*' before it: put the narrower rule "
        "first, or remove one",
    ),
    "an axis that splits two dims": (
        {"mlp/w1": P("model", "model")},
        "Plan(params={'mlp/w1': P('model', 'model')}) needs each mesh axis once, since an axis "
        "splits one dim: leave one out, or use another axis for it",
    ),
    "a data axis": (
        {"mlp/w1": P(None, "data")},
        "Plan(params={'mlp/w1': P(None, 'data')}) needs other axes than the data axes, got 'data': "
        "a step computes the examples of each device there with the same parameters. Split over "
        "another axis of the mesh, as MeshSpec(axes=('data', 'model'), shape=...)",
    ),
    "no spec": (
        {"mlp/w1": (None, "model")},
        "Plan needs params= PartitionSpecs by path, got (None, 'model') for 'mlp/w1': write "
        "jax.sharding.PartitionSpec((None, 'model'))",
    ),
    "no path": (
        {("mlp", "w1"): P(None, "model")},
        "Plan needs params= PartitionSpecs by path, got ('mlp', 'w1') as a path: write the keys "
        "with slashes between them, as 'mlp/w1', with * for any characters",
    ),
    "no rules": (
        [("mlp/w1", P(None, "model"))],
        "Plan needs params= a dict of PartitionSpecs by path, got list: write params={'mlp/w1': "
        "PartitionSpec(None, 'model')}",
    ),
    "an entry that is no axis": (
        {"mlp/w1": P(None, P.UNCONSTRAINED)},
        "needs a mesh axis, a tuple of them, or None for each dim: what is not split is None",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_rule_is_refused_before_anything_compiles(name):
    rules, text = REFUSED[name]
    with pytest.raises((ValueError, TypeError)) as refused:
        models.engine((2, 4), rules=rules).create_state(models.params())
    assert text in str(refused.value)


def test_dims_are_checked_where_the_axis_has_one_device_too():
    with pytest.raises(ValueError, match="needs at least 2 dims"):
        models.engine((1, 1), rules={"b2": P(None, "model")}).create_state(models.params())


@pytest.mark.parametrize(
    "optimizer, text",
    [
        (
            optax.adam(0.1),
            "the plan splits parameters over 'model', and the optimizer is not known to be right "
            "on parts: optax's norms would be those of each part by itself. Use tx.optim.sgd or "
            "adamw; tx.optim.from_optax(..., elementwise=True) or Optimizer(..., "
            "handles_shards=True) if each element's update depends on that element alone; or store "
            "the parameters whole",
        ),
        (
            tx.optim.from_optax(optax.sgd(0.1), per_example=True, elementwise=True),
            "the plan splits parameters over 'model', and an optimizer with per_example=True needs "
            "each example's gradient whole, to clip it by its norm: store the parameters whole "
            "(leave Plan(params=...) out)",
        ),
        (
            tx.optim.from_optax(optax.adafactor(0.1, min_dim_size_to_factor=2), elementwise=True),
            "has shape (1,), but params['mlp']['b1'], whose gradient is split over 'model', has "
            "(8,): each device would need another part of it than it has. Use an optimizer that "
            "is elementwise (tx.optim.adamw), or store params['mlp']['b1'] whole",
        ),
    ],
    ids=["optax", "per example", "factored"],
)
def test_an_optimizer_that_needs_whole_leaves(optimizer, text):
    with pytest.raises(ValueError) as refused:
        models.engine((2, 2), optimizer).create_state(models.params())
    assert text in str(refused.value)
    models.engine((2, 1), optimizer).create_state(models.params())  # nothing is split there


def refused(step, shape=(2, 2), **options):
    engine = models.engine(shape, **options)
    with pytest.raises(ValueError) as found:
        tx.step_fn(step)(engine.create_state(models.params()), models.batch())
    return str(found.value)


def test_the_gradient_of_a_part_has_to_be_reduced_over_the_data():
    def step(state, b):
        grads = tx.grad(models.loss_of)(state.params, b)
        return state.apply_gradients(grads=grads), {}

    text = refused(step)
    assert "needs reduced gradients: the gradient of params['b2'] varies along axis 'data'" in text

    def of_the_rest(state, b):
        grads = tx.grad(models.loss_of)(state.params, b)
        own = {"b2": grads["b2"], "scale": grads["scale"]}
        return state.apply_gradients(grads={**grads, **tx.pmean(own, "data")}), {}

    text = refused(of_the_rest)
    assert "the gradient of params['mlp']['b1'] varies along axis 'data'" in text
    assert "state.sync_gradients(grads), before apply_gradients" in text


def test_the_gradient_of_a_whole_parameter_has_to_be_the_same_on_all_parts():
    def step(state, b):
        grads = tx.grad(models.loss_of)(state.params, b)
        grads, state = state.sync_gradients(grads)
        grads["b2"] = grads["b2"] * (1 + tx.axis_index("model"))
        return state.apply_gradients(grads=grads), {}

    assert (
        "the gradient of params['b2'] varies along axis 'model', so it was never reduced there "
        "(test_param_rules.py:"
    ) in refused(step)
    assert (
        "and the plan stores its parameter whole. Where each device holds a part of the gradient, "
        "add them up: tx.psum(grad, 'model'); where each holds its part of the parameter, say so: "
        "Plan(params={path: PartitionSpec(...)})"
    ) in refused(step)


def test_the_gradient_of_the_whole_for_a_part():
    def step(state, b):
        grads = tx.grad(models.loss_of)(state.params, b)
        grads, state = state.sync_gradients(grads)
        grads["mlp"]["b1"] = tx.all_gather(grads["mlp"]["b1"], "model")
        return state.apply_gradients(grads=grads), {}

    assert (
        "needs the gradient of params['mlp']['b1'] in its shape (4,) (this device's part along "
        "'model'), got (8,)"
    ) in refused(step)


def test_state_that_is_stored_whole_has_to_stay_so():
    def step(state, b):
        grads = tx.grad(models.loss_of)(state.params, b)
        grads, state = state.sync_gradients(grads)
        state = state.apply_gradients(grads=grads)
        moved = state.stored_params["b2"] + tx.axis_index("model")
        return state.replace(stored_params={**state.stored_params, "b2": moved}), {}

    assert "that is the same on every device, but state.stored_params['b2'] varies" in refused(step)


def test_a_metric_of_a_part():
    def step(state, b):
        return state, {"size": jnp.sum(state.stored_params["mlp"]["b1"])}

    assert "metrics['size'] varies along axis 'model'" in refused(step)


def test_the_norm_of_another_tree():
    def step(state, b):
        grads = tx.grad(models.loss_of)(state.params, b)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"norm": tx.optim.global_norm(grads["mlp"])}

    assert (
        "tx.optim.global_norm needs a tree like state.params, to know which of its leaves the plan "
        "splits, got one whose leaf ['b1'] varies along 'model': give it all gradients, or add the "
        "squares up yourself, tx.psum(jnp.sum(x**2), 'model')"
    ) in refused(step)


def test_the_norm_of_a_group_of_parameters():
    """None stands for the leaves of other groups, as in optax.masked: the paths tell the parts."""

    def step(state, b):
        grads = tx.grad(models.loss_of)(state.params, b)
        grads, state = state.sync_gradients(grads)
        group = {"mlp": {**grads["mlp"], "w2": None}, "b2": None, "scale": None}
        group = tx.optim.clip_by_global_norm(group, 0.5)
        return state, {"norm": tx.optim.global_norm(group)}

    engine = models.engine((2, 2))
    _, metrics = tx.step_fn(step)(engine.create_state(models.params()), models.batch())
    assert float(metrics["norm"]) == pytest.approx(0.5, rel=1e-6)


def test_clipping_another_tree():
    def step(state, b):
        grads = tx.grad(models.loss_of)(state.params, b)
        grads, state = state.sync_gradients(grads)
        grads["mlp"] = tx.optim.clip_by_global_norm(grads["mlp"], 1.0)
        return state.apply_gradients(grads=grads), {}

    assert "clip_by_global_norm needs gradients that are whole and equal on every" in refused(step)


def test_states_made_of_the_parameters_lie_like_their_gradients():
    shape = jax.ShapeDtypeStruct
    params = {"m": {"w": shape((4, 8), "float32")}, "w": shape((4, 8), "float32")}
    layouts = {"m": {"w": Layout(P("model"), P("model"), ())}, "w": Layout(P(), P("x"), ())}
    tree = {
        "m": params,  # the path of its last leaf is that of another parameter
        "count": shape((), "int32"),
        "masked": [{"m": {"w": shape((4, 8), "float32")}}],
        "other": {"u": shape((4, 8), "float32")},
    }
    assert mirrored_specs("opt", tree, params, layouts) == {
        "m": {"m": {"w": P("model")}, "w": P("x")},
        "count": P(),
        "masked": [{"m": {"w": P("model")}}],
        "other": {"u": P()},
    }


def test_a_plan_takes_keywords():
    text = (
        "Plan takes keywords alone, got DP(axis='data'): write "
        "tx.Plan(data_parallel=DP(axis='data'))"
    )
    with pytest.raises(TypeError) as found:
        tx.Plan(*[tx.DP("data")])
    assert str(found.value) == text


def test_groups_of_optimizers_on_parts():
    """Each clips by the norm of its own group, and all by that of all, as on one device."""

    def make():
        sgd = tx.optim.sgd(0.1, momentum=0.9, clip_norm=0.3)
        return tx.optim.groups({"mlp/w*": tx.optim.adamw(0.01), "*": sgd}, clip_norm=1.0)

    def train(shape):
        engine = models.engine(shape, make())
        state = engine.create_state(models.params())
        for seed in range(2):
            state, _ = models.train_step(state, models.batch(seed))
        return models.host((state.stored_params, state.opt_state))

    ours, one = train((2, 2)), train((1, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, one)
