"""States of several engines as trees: mapped together, under jax's caches, copied and pickled."""

import copy
import gc
import pickle
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import txcore as tx


def differences(a, b):
    return jax.tree.map(lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), a, b)


def start(devices=2, **options):
    return toys.engine(devices, **options).create_state(toys.params())


class TestTwoEngines:
    def test_states_map_together(self):
        ours, theirs = start(1), start(4, precision="bfloat16", optimizer=tx.optim.sgd(0.3))
        batch = toys.batch()
        ours, _ = toys.train_step(ours, batch)
        theirs, _ = toys.train_step(theirs, batch)
        found = differences(ours, theirs)
        assert found.engine is ours.engine
        assert found.step == 0
        wanted = np.abs(np.asarray(ours.params["w1"]) - np.asarray(theirs.params["w1"])).max()
        assert found.params["w1"] == wanted > 0

    def test_their_structures_are_equal(self):
        ours, theirs = (jax.tree.structure(start(n)) for n in (1, 2))
        assert ours == theirs
        assert hash(ours) == hash(theirs)

    def test_each_runs_on_its_own(self):
        states = [start(n, optimizer=tx.optim.sgd(rate)) for n, rate in ((1, 0.1), (2, 0.2))]
        copied = [jax.tree.map(jnp.copy, state) for state in states]
        for state, other in zip(states, copied, strict=True):
            assert other.engine is state.engine
            wanted, _ = toys.train_step(state, toys.batch())
            found, _ = toys.train_step(other, toys.batch())
            assert found.engine is wanted.engine
            assert not any(jax.tree.leaves(differences(found, wanted)))

    def test_another_engines_state_is_refused(self):
        with pytest.raises(ValueError, match="runs states that its create_state made"):
            toys.engine(1).run(toys.train_step, start(1), toys.batch())

    @pytest.mark.parametrize("inner", ["jit", "scan"])
    def test_a_cached_function_in_the_steps_of_two(self, inner):
        """jax keeps the trace of `update`, with the first engine's learning rate in it."""

        def update(state, grads):
            return state.apply_gradients(grads=grads), None

        jitted = jax.jit(update)

        @tx.step_fn
        def step(state, batch):
            grads = jax.tree.map(jnp.ones_like, state.stored_params)
            if inner == "jit":
                state, _ = jitted(state, grads)
            else:
                state, _ = jax.lax.scan(update, state, jax.tree.map(lambda g: g[None], grads))
            return state, {"loss": tx.pmean(batch["x"].mean(), "data")}

        for rate in (0.5, 0.25):
            state = start(2, optimizer=tx.optim.sgd(rate))
            before = np.asarray(state.params["w1"])
            state, _ = step(state, toys.batch())
            np.testing.assert_allclose(before - np.asarray(state.params["w1"]), rate, rtol=1e-6)


class TestWithoutAnEngine:
    def test_jit_returns_a_state_of_none(self):
        """One program serves the states of all engines, so that it cannot know whose it returns."""
        double = jax.jit(lambda state: state.replace(extra=2 * state.extra))
        engines = [toys.engine(2, optimizer=tx.optim.sgd(rate)) for rate in (0.1, 0.2)]
        for engine in engines:
            state = engine.create_state(toys.params(), np.float32(3))
            wanted, _ = engine.run(toys.train_step, jax.tree.map(jnp.copy, state), toys.batch())
            found = double(state)
            with pytest.raises(RuntimeError, match=r"needs a state with an engine.*engine.run\("):
                toys.train_step(found, toys.batch())
            found, _ = engine.run(toys.train_step, found, toys.batch())
            assert found.engine is engine
            assert float(found.extra) == 6
            np.testing.assert_array_equal(found.params["w1"], wanted.params["w1"])

    def test_what_the_engine_decides_is_not_traced(self):
        state = start(2, precision="float16")
        with pytest.raises(RuntimeError, match="needs a state with an engine"):
            jax.jit(lambda state: state.loss_scale)(state)

    def test_shapes(self):
        state = start(2)
        shapes = jax.eval_shape(lambda: state)
        assert shapes.engine is state.engine
        assert shapes.params["w1"].shape == state.params["w1"].shape

    def test_vmap_and_grad(self):
        state = start(1)
        found = jax.grad(lambda w: (state.replace(extra=w).extra ** 2).sum())(jnp.float32(3))
        assert found == 6


class TestCopies:
    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
    def test_a_copy_has_the_same_engine(self, copied):
        state = start(2)
        other = copied(state)
        assert other.engine is state.engine
        found, _ = toys.train_step(other, toys.batch())
        assert int(found.step) == 1

    def test_a_deep_copy_outlives_a_donated_state(self):
        state = start(2)
        before = np.asarray(state.params["w1"])
        kept = copy.deepcopy(state)
        toys.train_step(state, toys.batch())
        np.testing.assert_array_equal(kept.params["w1"], before)
        with pytest.raises(ValueError, match="was donated to an earlier step"):
            toys.train_step(state, toys.batch())

    def test_pickled(self):
        state = start(2)
        found = pickle.loads(pickle.dumps(state))
        wanted, _ = toys.train_step(state, toys.batch())
        with pytest.raises(RuntimeError, match="pickle returned"):
            toys.train_step(found, toys.batch())
        found, _ = wanted.engine.run(toys.train_step, found, toys.batch())
        assert not any(jax.tree.leaves(differences(found, wanted)))


class TestLives:
    def test_a_state_keeps_its_engine(self):
        state = start(2)
        gc.collect()
        assert int(toys.train_step(state, toys.batch())[0].step) == 1

    def test_jaxs_caches_do_not(self):
        state = start(2)
        engine = weakref.ref(state.engine)
        jax.jit(lambda state: state.step + 1)(state)
        leaves, structure = jax.tree.flatten(state)
        state, _ = toys.train_step(state, toys.batch())
        del state
        gc.collect()
        assert engine() is None
        del leaves, structure
