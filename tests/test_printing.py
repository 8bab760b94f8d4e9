"""How the objects that a user meets print themselves: one line, the given options, no array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore.printing import describe_scalar, describe_tree, format_call


def mesh():
    return tx.MeshSpec(jax.devices()[:4], axes=("data", "model"), shape=(2, 2))


def engine(**options):
    plan = tx.Plan(data_parallel=tx.DP("data"))
    return tx.Engine(mesh=mesh(), plan=plan, optimizer=tx.optim.sgd(0.1), **options)


MESH = "MeshSpec(axes=('data', 'model'), shape=(2, 2), 4 x cpu)"
PLAN = "Plan(data_parallel=DP(axis='data'))"


def test_a_mesh():
    assert repr(mesh()) == MESH


@pytest.mark.parametrize(
    "options, text",
    [
        ({}, "Plan()"),
        ({"data_parallel": tx.DP("data")}, PLAN),
        (
            {"data_parallel": tx.DP(("a", "b")), "batch": {"x": P("a", "b")}},
            f"Plan(data_parallel=DP(axis=('a', 'b')), batch={{'x': {P('a', 'b')!r}}})",
        ),
    ],
)
def test_a_plan(options, text):
    assert repr(tx.Plan(**options)) == text


@pytest.mark.parametrize(
    "options, text",
    [
        ({}, ""),
        ({"precision": "float16", "seed": 3}, ", precision='float16', seed=3"),
        (
            {"loggers": [tx.loggers.Basic(), print]},
            ", loggers=[<Basic>, <built-in function print>]",
        ),
        (
            {"on_nonfinite": "skip", "compiler_options": {"xla_cpu_enable_fast_math": False}},
            ", on_nonfinite='skip', compiler_options={'xla_cpu_enable_fast_math': False}",
        ),
    ],
)
def test_an_engine_shows_what_it_was_given(options, text):
    assert repr(engine(**options)) == f"Engine(mesh={MESH}, plan={PLAN}, optimizer=sgd(0.1){text})"


def test_a_state_shows_its_step_and_sizes():
    state = engine(precision="float16").create_state(
        {"w": np.zeros((3, 2), np.float32), "b": np.zeros(2, np.float32)}, extra={"n": jnp.ones(2)}
    )
    assert repr(state) == (
        "TrainState(step=0, stored_params=<2 arrays, 32 B>, opt_state=<0 arrays, 0 B>, "
        "extra=<1 array, 8 B>, loss_scaling=<4 arrays, 16 B>)"
    )


def test_a_state_can_be_printed_wherever_it_is(capsys):
    made = engine().create_state({"w": np.zeros(3, np.float32)})
    assert repr(jax.tree.map(lambda _: P(), made)).startswith(f"TrainState(step={P()!r}, ")
    assert "stored_params=<1 array, 12 B>" in repr(jax.eval_shape(lambda s: s, made))

    @tx.step_fn
    def step(state, batch):
        print(state)
        grads, state = state.sync_gradients(
            jax.grad(lambda p: (p["w"] * batch["x"]).sum())(state.params)
        )
        return state.apply_gradients(grads=grads), {}

    after, _ = step(made, {"x": np.ones((2, 3), np.float32)})
    assert "TrainState(step=<traced>, stored_params=<1 array, 12 B>" in capsys.readouterr().out
    assert repr(made).startswith("TrainState(step=<deleted>, ")  # it was donated
    assert repr(after).startswith("TrainState(step=1, ")


def test_checkpoints(tmp_path):
    assert repr(tx.Checkpoints(tmp_path, every=5)) == f"Checkpoints('{tmp_path}', every=5)"
    kept = tx.Checkpoints(tmp_path, every=5, keep=9, keep_best=("loss", "min"), resume="must")
    text = f"Checkpoints('{tmp_path}', every=5, keep=9, keep_best=['loss', 'min'], resume='must')"
    assert repr(kept) == text


class Wide:
    def __repr__(self):
        return "two\n  lines"


@pytest.mark.parametrize(
    "value, text",
    [
        (len, "<built-in function len>"),
        (mesh, "mesh"),
        (lambda: 0, "<function>"),
        (Wide(), "two lines"),
    ],
)
def test_a_call_is_one_line(value, text):
    assert format_call("f", value, same=(1, 1), other=(1, 1.0)) == f"f({text}, other=1)"


def test_what_has_no_size():
    assert describe_tree([P(), P()]) == "<2 leaves>"
    assert describe_tree(jax.random.key(0)).startswith("<1 array, ")
    assert describe_scalar(np.int32(3)) == "3"
