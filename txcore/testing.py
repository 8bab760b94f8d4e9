"""For tests of models and steps: run something sharded, and compare two plans."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from txcore.optim import Optimizer
from txcore.train import Engine, StepFn


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

    Runs the step over the batches on both, from the same parameters and seed, and compares
    after each step the metrics, the gradients that the optimizer was given (adamw and clipping
    would hide a wrong factor in its result), the updated parameters, the extra state and the
    loss scale. An exact plan changes where work happens, never the numbers.

    Args:
      step: the training step.
      params: initial parameters.
      batches: the global batches; a few with different data.
      engines: two engines with different meshes or plans, the first the reference.
      extra: initial model state that is not trained.
      rtol: relative tolerance.
      atol: absolute tolerance, as a share of the leaf's largest value.

    Raises:
      AssertionError: naming the leaf, the ratio between the two, and what usually causes it.
      ValueError: the engines have different seeds, or there is no batch.

    Example:
      >>> @tx.step_fn
      ... def step(state, batch):
      ...     loss, grads = tx.value_and_grad(lambda w: jax.numpy.mean(w * batch))(state.params)
      ...     grads, state = state.sync_gradients(grads)
      ...     return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}
      >>> def engine(n):
      ...     return tx.Engine(mesh=tx.MeshSpec(jax.devices()[:n]), plan=tx.Plan(tx.DP("data")),
      ...                      optimizer=tx.optim.sgd(0.1))
      >>> tx.testing.assert_plans_agree(
      ...     step, np.float32(2), [np.arange(8.0)], engines=(engine(1), engine(4)))
    """
    seeds = [engine.seed for engine in engines]
    if seeds[0] != seeds[1]:
        raise ValueError(
            f"assert_plans_agree needs engines with one seed, got {seeds[0]} and {seeds[1]}"
        )
    sizes = {n for e in engines for n in (*e.mesh.shape.values(), e.mesh.size) if n > 1}
    states = [_recording(engine).create_state(params, extra) for engine in engines]
    number = -1
    for number, batch in enumerate(batches):
        before = [_host(state.stored_params) for state in states]
        metrics: list[Any] = [None, None]
        for i in (0, 1):
            states[i], metrics[i] = step(states[i], batch)
        compare = _Comparison(f"step {number}", sizes, rtol, atol)
        compare("metrics", *map(_host, metrics))
        compare("gradients of params", *(_host(s.opt_state["grads"]) for s in states))
        after = [_host(s.stored_params) for s in states]
        updates = [
            jax.tree.map(np.subtract, new, old) for new, old in zip(after, before, strict=True)
        ]
        compare("update of params", *updates)
        compare("extra", *(_host(s.extra) for s in states))
        scalings = [_host(s.loss_scaling) for s in states]
        if None not in scalings:  # float16 may be compared with another precision
            compare("loss_scaling", *scalings)
    if number < 0:
        raise ValueError("assert_plans_agree needs at least one batch, got none")


def _host(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def _recording(engine: Engine) -> Engine:
    """Return an engine like `engine` whose optimizer state keeps the gradients of the last step."""
    inner = engine.optimizer

    def init(params: Any) -> Any:
        zeros = jax.tree.map(np.zeros_like, params)
        return {"inner": inner.init(params), "grads": zeros}

    def update(grads: Any, opt_state: Any, params: Any, *, step: jax.Array) -> Any:
        params, state = inner.update(grads, opt_state["inner"], params, step=step)
        kept = jax.tree.map(lambda g, old: g.astype(old.dtype), grads, opt_state["grads"])
        return params, {"inner": state, "grads": kept}

    return engine.with_optimizer(Optimizer(init, update))


@dataclass(frozen=True)
class _Comparison:
    """Compare two trees of float64 arrays; `sizes` are the numbers of devices that may explain."""

    when: str
    sizes: set[int]
    rtol: float
    atol: float

    def __call__(self, what: str, first: Any, second: Any) -> None:
        if jax.tree.structure(first) != jax.tree.structure(second):  # type: ignore[operator]
            raise AssertionError(
                f"{self.when}: {what} have another structure under the second plan: "
                f"{jax.tree.structure(first)} and {jax.tree.structure(second)}"
            )
        paths = jax.tree_util.tree_flatten_with_path(first)[0]
        for (path, left), right in zip(paths, jax.tree.leaves(second), strict=True):
            where = f"{self.when}: {what}{jax.tree_util.keystr(path)}"
            if left.shape != right.shape:
                raise AssertionError(f"{where} has shape {left.shape} and {right.shape}")
            if not (np.isfinite(left).all() and np.isfinite(right).all()):
                raise AssertionError(f"{where} is not finite: such values cannot be compared")
            scale = float(np.max(np.abs(left), initial=1e-30))
            if not np.allclose(right, left, rtol=self.rtol, atol=self.atol * scale):
                raise AssertionError(
                    f"{where} differs between the plans: {_explain(left, right, self.sizes)}"
                )


def _explain(left: np.ndarray, right: np.ndarray, sizes: set[int]) -> str:
    """Name the difference by its ratio where there is one: N and 1/N are the classics."""
    worst = float(np.max(np.abs(left - right)))
    large = np.abs(left) > 1e-3 * np.max(np.abs(left), initial=0.0)
    ratios = right[large] / left[large] if large.any() else np.array([np.nan])
    ratio = float(np.median(ratios))
    text = f"largest difference {worst:.3g}, median ratio second/first {ratio:.4g}"
    if np.isnan(ratio) or np.max(np.abs(ratios - ratio)) > 1e-2 * abs(ratio):
        return text
    for n in sorted(sizes):
        if abs(ratio - n) < 1e-2 * n:
            return f"{text} = N for N = {n} devices: summed where the mean is meant, or twice"
        if abs(ratio - 1 / n) < 1e-2 / n:
            return f"{text} = 1/N for N = {n} devices: averaged twice"
    return text
