"""Compare a training step under two plans, and say where they part."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from txcore import _compat
from txcore.parity.agreement import Agreement, name_factors, norm_of, of_inputs, of_rounding
from txcore.parity.operations import Side, find_first_difference
from txcore.parity.recording import recording
from txcore.plan.rules import is_of_blocks
from txcore.train import Engine, StepFn, TrainState
from txcore.train.numerics.precision import POLICIES


def assert_plans_agree(
    step: StepFn,
    params: Any,
    batches: Iterable[Any],
    *,
    engines: tuple[Engine, Engine],
    extra: Any = None,
    prepare: Callable[[Any, Engine], Any] | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-6,
) -> None:
    """Check that a step gives the same numbers on two engines, leaf by leaf.

    Runs the step over the batches on both and compares after each step the metrics, the gradients
    that the optimizer was given (adamw and clipping would hide a wrong factor in its result), the
    updated parameters, the optimizer's state, the extra state and the loss scale. Each step of
    the second begins where that of the first does, so that no error grows from step to step. An
    exact plan changes where work happens, never the numbers.

    Where they differ, both repeat the step, and what the model records (`tx.testing.record`) says
    at which operation they part first.

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
      prepare: `prepare(batch, engine)` returns the batch as an engine's step takes it: the sequence
        in the order of `tx.context.split_chunks`, for one. None: as it is.
      rtol: relative tolerance.
      atol: absolute tolerance, as a share of the leaf's largest value.

    Raises:
      AssertionError: naming the leaf, how many of its elements differ, the ratio between the
        two, what usually causes it, and the first recorded operation that differs.
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
    factors = _name_factors(engines)
    recorded = [_record_gradients(engine) for engine in engines]
    states = [engine.create_state(params, extra) for engine in recorded]
    begun = [_to_float64(state.arrays["loss_scaling"]) for state in states]
    if None not in begun:  # float16 may be compared with another precision
        Agreement("step 0", factors, rtol, atol).check("loss_scaling", *begun)
    number = -1
    for number, batch in enumerate(batches):
        given = [batch if prepare is None else prepare(batch, engine) for engine in engines]
        start = _to_host(states[0].arrays)
        states[1] = _starting_at(start, states[1])
        ends = []
        for i in (0, 1):
            states[i], metrics = step(states[i], given[i])
            ends.append(_End(_to_host(metrics), _stack_like(start, _to_host(states[i].arrays))))
        reference = _Reference(step, states[0], given[0], start)
        agreement = Agreement(f"step {number}", factors, rtol, atol)
        try:
            _compare_steps(agreement, reference, *ends)
        except AssertionError as error:
            where = _find_operation(agreement, reference, states[1], given[1])
            raise AssertionError(f"{error}\n{where}") from None
    if number < 0:
        raise ValueError("assert_plans_agree needs at least one batch, got none")


def _name_factors(engines: tuple[Engine, Engine]) -> dict[int, str]:
    pipelines = [engine.plan.pipeline for engine in engines]
    counts = {"microbatches": max((p.microbatches for p in pipelines if p is not None), default=1)}
    return name_factors([engine.mesh.shape for engine in engines], counts)


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
        state, metrics = self.step(_starting_at(self.change_start(seed), self.state), self.batch)
        return _End(_to_host(metrics), _to_host(state.arrays))

    def change_start(self, seed: int) -> dict[str, Any]:
        """Return what it began with, parameters changed in their last places."""
        random = np.random.default_rng(seed)
        size = 8 * float(jnp.finfo(POLICIES[self.state.precision.compute]).eps)

        def change_leaf(x: np.ndarray) -> np.ndarray:
            if not jnp.issubdtype(x.dtype, jnp.floating):
                return x
            return np.asarray(x * (1 + size * random.uniform(-1, 1, x.shape)), x.dtype)

        changed = {"stored_params": jax.tree.map(change_leaf, self.start["stored_params"])}
        return {**self.start, **changed}

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


def _find_operation(
    agreement: Agreement, reference: _Reference, second: TrainState, batch: Any
) -> str:
    """Repeat a step on both engines, and say at which recorded operation they part."""

    def repeat(state: TrainState, starts: list[dict[str, Any]], batch: Any) -> list[Side]:
        # Another engine, since this one's steps were compiled without recording.
        engine = state.engine.with_optimizer(state.engine.optimizer)  # type: ignore[attr-defined]
        plan, made = engine.plan, []
        axes = () if plan.data_parallel is None else plan.data_parallel.axes
        axes += () if plan.pipeline is None else (plan.pipeline.axis,)
        with recording() as found:
            for start in starts:
                fresh = TrainState(**_starting_at(start, state).arrays)
                jax.block_until_ready(engine.run(reference.step, fresh, batch))
                idly = plan.pipeline is not None and plan.context is not None
                made.append(Side(found.take(), axes, plan.context, idly))
        return made

    starts = [reference.start, *(reference.change_start(seed) for seed in range(2))]
    first, *noise = repeat(reference.state, starts, reference.batch)
    (other,) = repeat(second, [reference.start], batch)
    options: Any = {"factors": agreement.factors, "rtol": agreement.rtol}
    return find_first_difference(first, other, noise=noise, **options)


def _as_numbers(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _compat.is_key_array(leaf) else leaf


def _to_host(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.array(_as_numbers(leaf)), tree)


def _to_float64(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(_as_numbers(leaf), np.float64), tree)


def _stack_like(first: Any, second: Any) -> Any:
    """Return a tree whose layers are stacked as in another one, whatever the chunks of its plan."""
    if jax.tree.structure(first) != jax.tree.structure(second):  # type: ignore[operator]
        return second

    def stack_leaf(path: Any, wanted: Any, leaf: Any) -> Any:
        same = np.size(wanted) == np.size(leaf) and any(is_of_blocks((key,)) for key in path)
        return np.reshape(leaf, np.shape(wanted)) if same else leaf

    return jax.tree_util.tree_map_with_path(stack_leaf, first, second)


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
    start = {name: _stack_like(shapes[name], tree) for name, tree in start.items()}
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
