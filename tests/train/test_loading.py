"""Parameters alone out of a checkpoint, and the best checkpoint by a metric."""

import logging
import re
import warnings

import checkpoint_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import txcore as tx
from txcore.train.checkpoints import manifest

pytest.importorskip("orbax.checkpoint")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder and its last state."""
    folder = tmp_path_factory.mktemp("run")
    _, state = cases.train(folder, steps=7)
    return folder, state


def says(text):
    return pytest.raises(tx.CheckpointError, match=f"^{re.escape(text)}")


class TestLoadParams:
    @pytest.mark.parametrize("like", [toys.params(), jax.eval_shape(lambda: toys.params())])
    def test_as_they_were_saved(self, like, run):
        folder, state = run
        found = tx.load_params(folder, like)
        jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(np.asarray, state.params))
        assert all(isinstance(x, np.ndarray) for x in found.values())

    def test_for_another_mesh_optimizer_and_precision(self, run):
        folder, state = run
        engine = toys.engine(4, optimizer=tx.optim.adamw(0.1), precision="bfloat16", seed=9)
        fresh = engine.create_state(tx.load_params(folder, toys.params()))
        np.testing.assert_array_equal(fresh.stored_params["w1"], state.stored_params["w1"])
        assert fresh.stored_params["w1"].sharding.num_devices == 4
        engine.run(toys.train_step, fresh, toys.batch())

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
    def test_in_another_precision(self, dtype, run):
        folder, state = run
        like = jax.tree.map(lambda x: np.zeros(x.shape, dtype), toys.params())
        found = tx.load_params(folder, like)
        assert found["w1"].dtype == dtype
        want = np.asarray(state.stored_params["w1"]).astype(dtype)
        np.testing.assert_array_equal(found["w1"], want)

    def test_one_checkpoint_and_a_part_of_it(self, run):
        folder, _ = run
        _, early = cases.train(None, steps=3)
        found = tx.load_params(folder / "step_00000003", {"w2": toys.params()["w2"]})
        np.testing.assert_array_equal(found["w2"], early.stored_params["w2"])
        assert list(found) == ["w2"]

    def test_extra(self, run):
        folder, state = run
        found = tx.load_extra(folder, {"mean": np.float32(0)})
        assert found["mean"] == np.asarray(state.extra["mean"])

    def test_a_run_that_uses_the_folder_does_not_matter(self, run):
        folder, state = run
        with tx.Checkpoints(folder, every=1) as checkpoints:
            checkpoints.restore(cases.start(state.engine))
            tx.load_params(folder, toys.params())

    @pytest.mark.parametrize(
        "like, text",
        [
            (
                {"w1": np.zeros((4, 9), np.float32), "w3": np.zeros(2, np.float32)},
                "does not hold these params: params['w1'] is float32[4, 8] in it and float32[4, 9] "
                "here; params['w3'] (float32[2]) is not in it. Give params like those that it was "
                "saved from, or a part of them",
            ),
            (
                {"w1": np.zeros((4, 8), np.int32)},
                "does not hold these params: params['w1'] is float32[4, 8] in it and int32[4, 8] h",
            ),
            (
                {f"b{i}": np.zeros(2) for i in range(9)},
                "does not hold these params: params['b0'] (float64[2]) is not in it; params['b1'] "
                "(float64[2]) is not in it; params['b2'] (float64[2]) is not in it; and 6 more. Gi",
            ),
        ],
    )
    def test_leaves_that_do_not_fit(self, like, text, run):
        with says(f"{run[0] / 'step_00000007'} {text}"):
            tx.load_params(run[0], like)

    def test_a_damaged_one_is_passed_over(self, run, tmp_path, caplog):
        import shutil

        folder = shutil.copytree(run[0], tmp_path / "run")
        (folder / "step_00000007" / "_METADATA").write_text("")
        with caplog.at_level(logging.WARNING, "txcore"):
            found = tx.load_params(folder, toys.params())
        _, early = cases.train(None, steps=6)
        np.testing.assert_array_equal(found["w1"], early.stored_params["w1"])
        assert "_METADATA has 0 bytes" in caplog.messages[0]
        with says(f"{folder / 'step_00000007'} is damaged: _METADATA has 0 bytes"):
            tx.load_params(folder / "step_00000007", toys.params())

    def test_nothing_there(self, tmp_path):
        with says(f"{tmp_path} has no checkpoint to load"):
            tx.load_params(tmp_path, toys.params())
        with says(f"{tmp_path / 'step_00000001'} has no txcore.json"):
            tx.load_params(tmp_path / "step_00000001", toys.params())

    def test_values_that_the_dtype_does_not_hold(self, tmp_path):
        engine = toys.engine(1)
        with tx.Checkpoints(tmp_path, every=1) as checkpoints:
            state = engine.create_state({"w": np.float32([1e30, 1])})
            checkpoints.save(state, tx.train.Position(steps=1))
        with says("params['w'] holds values that float16 cannot: give a wider dtype"):
            tx.load_params(tmp_path, {"w": np.zeros(2, np.float16)})
        assert tx.load_params(tmp_path, {"w": np.zeros(2)})["w"][0] == np.float32(1e30)


def keep_best(folder, values, *, keep=1, every=4, steps=None, eval_every=2, mode="max", **options):
    """Run, with an evaluation whose accuracy after step n is values[n]."""
    engine = cases.engine(1)
    checkpoints = tx.Checkpoints(
        folder, every=every, keep=keep, keep_best=("accuracy", mode), **options
    )

    def evaluate(state):
        return {"accuracy": values.get(int(state.step), 0.0)}

    engine.fit(
        *(cases.step, cases.start(engine), cases.batches),
        steps=steps or max(values),
        evaluate=evaluate,
        eval_every=eval_every,
        checkpoints=checkpoints,
    )
    return checkpoints


class TestKeepBest:
    @pytest.mark.parametrize("mode, sign", [("max", 1), ("min", -1)])
    def test_it_survives_pruning(self, mode, sign, tmp_path):
        curve = {2: 0.3, 4: 0.5, 6: 0.9, 8: 0.7, 10: 0.8, 12: 0.2}
        values = {step: sign * value for step, value in curve.items()}
        found = keep_best(tmp_path, values, mode=mode)
        assert cases.saved(tmp_path) == ["step_00000006", "step_00000012"]
        assert found.best == tmp_path / "step_00000006"
        assert manifest.read_manifest(found.best).metric == ("accuracy", mode, sign * 0.9)
        best = tx.load_params(tmp_path, toys.params(), best=True)
        _, state = cases.train(None, n=1, steps=6)
        np.testing.assert_array_equal(best["w1"], state.stored_params["w1"])
        assert int(newest(tmp_path).step) == 12, "resume takes the newest"

    def test_it_survives_a_resume(self, tmp_path):
        keep_best(tmp_path, {2: 0.5, 4: 0.9, 6: 0.7, 8: 0.6})
        found = keep_best(tmp_path, {10: 0.8, 12: 0.85, 14: 0.1})
        assert cases.saved(tmp_path) == ["step_00000004", "step_00000014"]
        assert found.best == tmp_path / "step_00000004"
        found = keep_best(tmp_path, {16: 0.95, 18: 0.1})
        assert found.best == tmp_path / "step_00000016"
        assert cases.saved(tmp_path) == ["step_00000016", "step_00000018"]

    @pytest.mark.parametrize("nothing", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_is_never_the_best(self, nothing, tmp_path):
        found = keep_best(tmp_path, {2: nothing, 4: nothing})
        assert found.best is None
        found = keep_best(tmp_path, {6: nothing, 8: 0.1, 10: nothing, 12: nothing})
        assert found.best == tmp_path / "step_00000008"

    def test_the_last_step_may_be_the_best(self, tmp_path):
        """It is saved because it is due, and evaluated afterwards."""
        found = keep_best(tmp_path, {4: 0.5, 8: 0.9}, eval_every=None, keep=3)
        assert found.best == tmp_path / "step_00000008"
        manifest.verify_files(found.best, manifest.read_manifest(found.best))
        tx.load_params(tmp_path, toys.params(), best=True)

    def test_of_equal_ones_the_first(self, tmp_path):
        found = keep_best(tmp_path, {2: 0.5, 4: 0.5, 6: 0.5}, keep=3)
        assert found.best == tmp_path / "step_00000002"

    def test_a_damaged_best_one_is_passed_over(self, tmp_path, caplog):
        found = keep_best(tmp_path, {2: 0.9, 4: 0.5, 6: 0.7, 8: 0.1}, keep=4)
        (found.best / "_METADATA").write_text("")
        best = tx.load_params(tmp_path, toys.params(), best=True)
        want = tx.load_params(tmp_path / "step_00000004", toys.params())
        np.testing.assert_array_equal(best["w1"], want["w1"])
        assert "is damaged" in caplog.messages[0]

    def test_a_metric_that_is_missing(self, tmp_path):
        text = (
            "Checkpoints(keep_best=('accuracy', 'max')) needs evaluate= to return the metric "
            "'accuracy', got 'loss', 'top5': name one of those, or return it"
        )
        engine = cases.engine(1)
        checkpoints = tx.Checkpoints(tmp_path, every=3, keep_best=("accuracy", "max"))
        for steps in (2, 4):  # after the last step alone, and before it
            with pytest.raises(tx.CheckpointError, match=f"^{re.escape(text)}$") as caught:
                engine.fit(
                    *(cases.step, cases.start(engine), cases.batches),
                    **{"steps": steps, "eval_every": 4, "checkpoints": checkpoints},
                    evaluate=lambda state: {"loss": 1.0, "top5": 0.5},
                )
            assert int(caught.value.state.step) == steps
            assert cases.saved(tmp_path)[-1] == f"step_{steps:08d}", "what was trained is safe"

    def test_a_metric_that_is_no_number(self, tmp_path):
        with says(
            "Checkpoints(keep_best=('accuracy', 'max')) needs evaluate= to return the metric "
            "'accuracy' as one number, got [1.0, 2.0]: return a scalar"
        ):
            keep_best(tmp_path, {2: np.float32([1, 2])})

    def test_arguments(self, tmp_path):
        for wrong in ("accuracy", ("accuracy",), ("accuracy", "most"), (1, "max")):
            with pytest.raises(ValueError, match=r"^Checkpoints needs keep_best= the name of a me"):
                tx.Checkpoints(tmp_path, every=1, keep_best=wrong)
        engine = cases.engine(1)
        checkpoints = tx.Checkpoints(tmp_path, every=1, keep_best=("accuracy", "max"))
        text = "fit needs evaluate= for Checkpoints(keep_best=('accuracy', 'max')), got none: give"
        with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
            engine.fit(cases.step, cases.start(engine), [], steps=1, checkpoints=checkpoints)
        with says(f"no checkpoint in {tmp_path} has a metric: train with Checkpoints(keep_best=)"):
            tx.load_params(tmp_path, toys.params(), best=True)


def newest(folder):
    """The state that a resumed run begins with."""
    with tx.Checkpoints(folder, every=1, resume="must") as checkpoints:
        return checkpoints.restore(cases.start(cases.engine(1)))[0]


EXTRA = {
    "keys": jax.random.split(jax.random.key(3), 2),
    "fast": jax.random.key(5, impl="unsafe_rbg"),
    "empty": np.zeros((0, 3), np.float32),
    "small": np.arange(-8, 8).astype(np.int8),
    "half": np.float32([1.5, -2.25]).astype(jnp.bfloat16),
    "flag": np.array([True, False]),
}


class TestEveryKindOfLeaf:
    """Saved, restored and loaded: arrays without elements, PRNG keys, small dtypes."""

    @staticmethod
    @tx.step_fn
    def step(state, batch):
        """Draw noise by the keys in extra, which go on."""

        def loss_of(p):
            noise = jax.random.normal(state.extra["keys"][0], (4,))
            out = toys.local_loss(p, {**batch, "x": batch["x"] + 0.1 * noise})
            return out + p["none"].sum()

        loss, grads = tx.value_and_grad(loss_of)(state.params)
        grads, state = state.sync_gradients(grads)
        keys = jax.vmap(lambda key: jax.random.split(key)[0])(state.extra["keys"])
        state = state.replace(extra={**state.extra, "keys": keys})
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}

    def train(self, n, steps, directory=None, **options):
        engine = toys.engine(n, optimizer=tx.optim.sgd(0.1, momentum=0.9), **options)
        params = {**toys.params(), "none": np.zeros((0, 2), np.float32)}
        state = engine.create_state(params, extra=EXTRA)
        checkpoints = directory and tx.Checkpoints(directory, every=2)
        return engine.fit(self.step, state, cases.batches, steps=steps, checkpoints=checkpoints)

    def equal(self, a, b):
        jax.tree.map(np.testing.assert_array_equal, numbers(a.arrays), numbers(b.arrays))

    def test_a_resumed_run_is_the_uninterrupted_one(self, tmp_path):
        options = {"on_nonfinite": "skip"}  # which selects between states, keys among them
        whole = self.train(2, 6, **options)
        self.train(2, 3, tmp_path, **options)
        resumed = self.train(2, 6, tmp_path, **options)
        self.equal(resumed, whole)
        assert resumed.stored_params["none"].shape == (0, 2)
        assert resumed.extra["fast"].dtype == EXTRA["fast"].dtype
        kinds = dict(manifest.read_manifest(tmp_path / "step_00000006").leaves)
        assert kinds["stored_params['none']"] == "float32[0, 2]"
        assert kinds["extra['keys']"] == "key<fry>[2]"

    def test_on_any_number_of_devices(self):
        one, four = self.train(1, 3), self.train(4, 3)
        assert numbers(four.extra)["keys"].tolist() == numbers(one.extra)["keys"].tolist()
        np.testing.assert_allclose(
            four.stored_params["w1"], one.stored_params["w1"], rtol=1e-5, atol=1e-7
        )

    def test_loaded_alone(self, tmp_path):
        state = self.train(1, 2, tmp_path)
        found = tx.load_extra(tmp_path, EXTRA)
        shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, EXTRA))
        for extra in (found, tx.load_extra(tmp_path, shapes)):
            jax.tree.map(np.testing.assert_array_equal, numbers(extra), numbers(state.extra))
        params = {**toys.params(), "none": np.zeros((0, 2), np.float32)}
        assert tx.load_params(tmp_path, params)["none"].shape == (0, 2)

    def test_keys_of_another_generator(self, tmp_path):
        self.train(1, 2, tmp_path)
        text = "extra['fast'] is key<urbg>[] in it and key<fry>[] here"
        with pytest.raises(tx.CheckpointError, match=re.escape(text)):
            tx.load_extra(tmp_path, {**EXTRA, "fast": jax.random.key(0)})

    def test_the_callers_keys_stay(self):
        self.train(1, 2)
        assert not EXTRA["keys"].is_deleted()


def numbers(tree):
    """A pytree's arrays on the host, keys as their numbers."""

    def number(x):
        keys = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if keys else x)

    return jax.tree.map(number, tree)


def dpsgd():
    """Optax's, whose arguments are being renamed."""
    import optax

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return optax.contrib.dpsgd(0.1, 1.0, 0.5, 3)


class TestOptaxStatesWithKeys:
    """add_noise and dpsgd: the same noise on every device, saved and resumed."""

    def optimizer(self, name):
        import optax

        if name == "add_noise":
            return optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1))
        return tx.optim.from_optax(dpsgd(), per_example=True)

    @staticmethod
    @tx.step_fn
    def private(state, batch):
        def one(params, example):
            return toys.losses(params, jax.tree.map(lambda x: x[None], example))[0]

        grads = jax.vmap(jax.grad(one), (None, 0))(state.params, batch)
        grads = tx.all_gather(grads, "data", invariant=True)
        return state.apply_gradients(grads=grads), {}

    def train(self, name, n, steps, directory=None):
        engine = toys.engine(n, optimizer=self.optimizer(name))
        step = toys.train_step if name == "add_noise" else self.private
        state = engine.create_state(toys.params())
        data = [toys.batch(seed=i) for i in range(4)]
        checkpoints = directory and tx.Checkpoints(directory, every=2)
        state = engine.fit(step, state, data, steps=steps, checkpoints=checkpoints)
        if n == 4:
            assert engine.audit(step, state, data[0]).ok
        return state

    def by_optax(self, name, steps):
        """The same by optax alone."""
        import optax

        optimizer = dpsgd() if name == "dpsgd" else self.optimizer(name)
        params = jax.tree.map(jnp.asarray, toys.params())
        state = optimizer.init(params)
        for i in range(steps):
            batch = toys.batch(seed=i)
            if name == "dpsgd":
                one = lambda p, b: toys.losses(p, jax.tree.map(lambda x: x[None], b))[0]  # noqa: E731
                grads = jax.vmap(jax.grad(one), (None, 0))(params, batch)
            else:
                grads = jax.grad(lambda p, b=batch: jnp.mean(toys.losses(p, b)))(params)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    @pytest.mark.parametrize("name", ["add_noise", "dpsgd"])
    def test_equal_on_1_2_and_4_devices_and_to_optax(self, name):
        want = self.by_optax(name, 3)
        for n in (1, 2, 4):
            found = self.train(name, n, 3).stored_params
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, want
            )

    @pytest.mark.parametrize("name", ["add_noise", "dpsgd"])
    def test_resumed(self, name, tmp_path):
        whole = self.train(name, 1, 4)
        self.train(name, 1, 3, tmp_path)
        resumed = self.train(name, 1, 4, tmp_path)
        jax.tree.map(np.testing.assert_array_equal, numbers(resumed.arrays), numbers(whole.arrays))

    def test_without_per_example(self):
        engine = toys.engine(1, optimizer=dpsgd())
        ours = "leaf .w1.* came out as .*per_example=True is for one that takes"
        with pytest.raises(ValueError, match=f"{ours}|a batch dimension in the 0th axis"):
            toys.train_step(engine.create_state(toys.params()), toys.batch())

    def test_per_example_needs_the_examples(self):
        engine = toys.engine(1, optimizer=self.optimizer("dpsgd"))
        text = "apply_gradients needs the gradient of params['w1'] in its shape (4, 8), after a dim"
        with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
            toys.train_step(engine.create_state(toys.params()), toys.batch())
