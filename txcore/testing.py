"""Test models and steps: run a function sharded, and compare two plans."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from txcore import _compat
from txcore.parity import Agreement, norm_of, of_inputs, of_rounding
from txcore.train import Engine, StepFn, TrainState
from txcore.train.numerics.precision import POLICIES


def run_sharded(
    f: Callable[..., Any],
    *args: Any,
    axes: Mapping[str, int],
    in_specs: Any = None,
    out_specs: Any = None,
    check_vma: bool = True,
) -> Any:
    """Run `f` inside `shard_map` on the first devices, and return NumPy arrays.

    Args:
      f: function written for one device.
      *args: pytrees of host arrays.
      axes: the mesh: size of each axis by name.
      in_specs: specs of the arguments; by default the leading dim over all axes.
      out_specs: specs of the results; by default the same.
      check_vma: whether jax tracks along which axes values vary.

    Returns:
      The results as NumPy arrays.

    Raises:
      ValueError: there are fewer devices than the mesh needs.

    Example:
      >>> tx.testing.run_sharded(lambda x: tx.psum(x, "data"), np.ones(2), axes={"data": 2})
      array([2., 2.], dtype=float32)
    """
    sizes = tuple(axes.values())
    need, have = int(np.prod(sizes)), jax.device_count()
    if have < need:
        raise ValueError(
            f"run_sharded needs {need} devices for the mesh {dict(axes)}, got {have}: set "
            f"jax.config.update('jax_num_cpu_devices', {need}) before jax touches a device"
        )
    devices = np.array(jax.devices()[:need], dtype=object).reshape(sizes)
    mesh = Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(sizes))
    everything = P(tuple(axes))
    mapped = jax.shard_map(
        f,
        mesh=mesh,
        in_specs=everything if in_specs is None else in_specs,
        out_specs=everything if out_specs is None else out_specs,
        check_vma=check_vma,
    )
    return jax.tree.map(np.asarray, jax.jit(mapped)(*args))


def assert_plans_agree(
    step: StepFn,
    params: Any,
    batches: Iterable[Any],
    *,
    engines: tuple[Engine, Engine],
    extra: Any = None,
    rtol: float = 1e-4,
    atol: float = 1e-6,
) -> None:
    """Check that a step gives the same numbers on two engines, leaf by leaf.

    Runs the step over the batches on both and compares after each step the metrics, the gradients
    that the optimizer was given (adamw and clipping would hide a wrong factor in its result), the
    updated parameters, the optimizer's state, the extra state and the loss scale. Each step of
    the second begins where that of the first does, so that no error grows from step to step. An
    exact plan changes where work happens, never the numbers.

    What rounding alone may change is no difference:

    - Where a leaf differs, the first engine repeats the step four times with its parameters changed
      in their last places. A leaf that this changes as much passes, and the log "txcore" notes
      how many of its elements differ: a tie in a max-pool, for one.
    - What is nothing but rounding, such as the gradient of a bias before a batch normalisation,
      which is really 0, may also differ by the last place of all gradients' norm.
    - An update may differ as much as the gradients' difference makes it: where they are nearly 0,
      Adam turns it into whole steps.

    Args:
      step: the training step.
      params: initial parameters.
      batches: the global batches; a few with different data.
      engines: two engines with different meshes or plans, the first the reference.
      extra: initial model state that is not trained.
      rtol: relative tolerance.
      atol: absolute tolerance, as a share of the leaf's largest value.

    Raises:
      AssertionError: naming the leaf, how many of its elements differ, the ratio between the
        two, and what usually causes it.
      ValueError: the engines have different seeds, or there is no batch.

    Example:
      >>> @tx.step_fn
      ... def step(state, batch):
      ...     loss, grads = tx.value_and_grad(lambda w: jax.numpy.mean(w * batch))(state.params)
      ...     grads, state = state.sync_gradients(grads)
      ...     return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}
      >>> def engine(n):
      ...     return tx.Engine(mesh=tx.MeshSpec(jax.devices()[:n]), optimizer=tx.optim.sgd(0.1),
      ...                      plan=tx.Plan(data_parallel=tx.DP("data")))
      >>> tx.testing.assert_plans_agree(
      ...     step, np.float32(2), [np.arange(8.0)], engines=(engine(1), engine(4)))
    """
    seeds = [engine.seed for engine in engines]
    if seeds[0] != seeds[1]:
        raise ValueError(
            f"assert_plans_agree needs engines with one seed, got {seeds[0]} and {seeds[1]}"
        )
    sizes: set[int] = set()  # that may explain the ratio of two results
    for engine in engines:
        sizes |= {n for n in (*engine.mesh.shape.values(), engine.mesh.size) if n > 1}
    states = [_record_gradients(engine).create_state(params, extra) for engine in engines]
    begun = [_to_float64(state.arrays["loss_scaling"]) for state in states]
    if None not in begun:  # float16 may be compared with another precision
        Agreement("step 0", sizes, rtol, atol).check("loss_scaling", *begun)
    number = -1
    for number, batch in enumerate(batches):
        start = _to_host(states[0].arrays)
        states[1] = _starting_at(start, states[1])
        ends = []
        for i in (0, 1):
            states[i], metrics = step(states[i], batch)
            ends.append(_End(_to_host(metrics), _to_host(states[i].arrays)))
        reference = _Reference(step, states[0], batch, start)
        _compare_steps(Agreement(f"step {number}", sizes, rtol, atol), reference, *ends)
    if number < 0:
        raise ValueError("assert_plans_agree needs at least one batch, got none")


@dataclass(frozen=True)
class _End:
    """Hold on the host what a step returned.

    Attributes:
      metrics: of the step.
      arrays: of the state, by field.
    """

    metrics: Any
    arrays: dict[str, Any]

    @property
    def grads(self) -> Any:
        return self.arrays["opt_state"]["grads"]

    @property
    def updated(self) -> tuple[Any, Any]:
        """The parameters and the optimizer's state."""
        return self.arrays["stored_params"], self.arrays["opt_state"]["inner"]


@dataclass(frozen=True)
class _Reference:
    """Hold a step of the first engine, to repeat it.

    Attributes:
      step: the training step.
      state: after it.
      batch: its batch.
      start: the arrays that it began with.
    """

    step: StepFn
    state: TrainState
    batch: Any
    start: dict[str, Any]

    def rounded_otherwise(self, seed: int) -> _End:
        """Repeat the step with parameters that are changed in their last places."""
        random = np.random.default_rng(seed)
        size = 8 * float(jnp.finfo(POLICIES[self.state.precision.compute]).eps)

        def change_leaf(x: np.ndarray) -> np.ndarray:
            if not jnp.issubdtype(x.dtype, jnp.floating):
                return x
            return np.asarray(x * (1 + size * random.uniform(-1, 1, x.shape)), x.dtype)

        changed = {"stored_params": jax.tree.map(change_leaf, self.start["stored_params"])}
        state = _starting_at({**self.start, **changed}, self.state)
        state, metrics = self.step(state, self.batch)
        return _End(_to_host(metrics), _to_host(state.arrays))

    def updated(self, grads: Any) -> tuple[Any, Any]:
        """Return the parameters and optimizer state that its optimizer makes of `grads`."""
        state = _starting_at(self.start, self.state)
        update = jax.jit(state.engine.optimizer.update)
        params, opt_state = update(grads, state.opt_state, state.stored_params, step=state.step)
        return _to_float64((params, opt_state["inner"]))


def _compare_steps(agreement: Agreement, reference: _Reference, first: _End, second: _End) -> None:
    """Compare everything that the two engines' steps returned."""

    @functools.cache
    def run_probes() -> list[_End]:
        return [reference.rounded_otherwise(seed) for seed in range(4)]

    @functools.cache
    def find_explained() -> tuple[Any, Any]:
        ends = (reference.updated(end.grads) for end in (second, first))
        return jax.tree.map(np.subtract, *ends)

    def check_part(what: str, get: Callable[[_End], Any], last_place: float = 0.0) -> None:
        left, right = _to_float64(get(first)), _to_float64(get(second))

        def read_probes() -> list[Any]:
            return [_to_float64(get(probe)) for probe in run_probes()]

        agreement.check(what, left, right, excuse=of_rounding(left, read_probes, last_place))

    check_part("metrics", lambda end: end.metrics)
    eps = float(np.finfo(np.float32).eps)
    check_part(
        "gradients of params", lambda end: end.grads, eps * norm_of(_to_float64(first.grads))
    )
    before = _to_float64(reference.start["stored_params"])
    updates = [
        jax.tree.map(np.subtract, _to_float64(e.updated[0]), before) for e in (first, second)
    ]
    last_places = [2 * np.spacing(np.abs(p)) for p in jax.tree.leaves(first.updated[0])]
    excuse = of_inputs(lambda: find_explained()[0])
    agreement.check("update of params", *updates, floor=last_places, excuse=excuse)
    states = [_to_float64(end.updated[1]) for end in (first, second)]
    if jax.tree.structure(states[0]) == jax.tree.structure(states[1]):  # type: ignore[operator]
        excuse = of_inputs(lambda: find_explained()[1])
        agreement.check("optimizer state", *states, excuse=excuse)
    check_part("extra", lambda end: end.arrays["extra"])
    if None not in [end.arrays["loss_scaling"] for end in (first, second)]:
        check_part("loss_scaling", lambda end: end.arrays["loss_scaling"])


def _as_numbers(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _compat.is_key_array(leaf) else leaf


def _to_host(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.array(_as_numbers(leaf)), tree)


def _to_float64(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(_as_numbers(leaf), np.float64), tree)


def _starting_at(start: dict[str, Any], state: TrainState) -> TrainState:
    """Return `state` with the arrays of `start`: those fields that it has in the same form."""

    def form_of(tree: Any) -> Any:
        return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]

    def place_leaf(host: np.ndarray, leaf: jax.Array) -> jax.Array:
        # device_put may alias the host's array, and a step donates it.
        placed = jnp.array(jax.device_put(host, leaf.sharding), copy=True)
        if _compat.is_key_array(leaf):
            placed = jax.random.wrap_key_data(placed, impl=jax.random.key_impl(leaf))
        return placed

    shapes = jax.eval_shape(lambda arrays: jax.tree.map(_as_numbers, arrays), state.arrays)
    same = [name for name in start if form_of(start[name]) == form_of(shapes[name])]
    places = {name: jax.tree.map(place_leaf, start[name], state.arrays[name]) for name in same}
    return state.replace(**places)


def _record_gradients(engine: Engine) -> Engine:
    """Return an engine like `engine` whose optimizer state keeps the gradients of the last step."""
    inner = engine.optimizer

    def init_state(params: Any) -> Any:
        zeros = jax.tree.map(np.zeros_like, params)
        return {"inner": inner.init(params), "grads": zeros}

    def update(grads: Any, opt_state: Any, params: Any, *, step: jax.Array) -> Any:
        params, state = inner.update(grads, opt_state["inner"], params, step=step)
        if inner.per_example:
            grads = jax.tree.map(lambda g: g.mean(0), grads)
        kept = jax.tree.map(lambda g, old: g.astype(old.dtype), grads, opt_state["grads"])
        return params, {"inner": state, "grads": kept}

    return engine.with_optimizer(replace(inner, init=init_state, update=update))
