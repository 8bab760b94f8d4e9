"""Timings of the implementations of one problem, with their errors; plain jax functions beside."""

import contextlib
import json
import time

MOST_CONFIGS = 3  # of an implementation, the best guesses: each takes seconds to compile
_DRY = [False]


@contextlib.contextmanager
def tracing_only():
    """Let this module trace programs for a GPU that is not here, and neither run nor time them."""
    _DRY[0] = True
    try:
        yield
    finally:
        _DRY[0] = False


def is_dry():
    """Tell whether programs are only traced."""
    return _DRY[0]


def compile_plain(function, *operands):
    """Compile a plain jax function; return a call that waits for its end."""
    import jax

    if _DRY[0]:
        return jax.eval_shape(function, *operands)
    compiled = jax.jit(function).lower(*operands).compile()
    jax.block_until_ready(compiled(*operands))

    def call_plain():
        return jax.block_until_ready(compiled(*operands))

    call_plain.temp = compiled.memory_analysis().temp_size_in_bytes
    return call_plain


def time_cases(shape, dtype, operands, *, backward=True, others=None, rounds=15, named=None):
    """Time every implementation and configuration of a shape, and other expressions of it."""
    import jax

    from txcore.kernels.dispatch import registry
    from txcore.kernels.dispatch.tuned import fields_of
    from txcore.kernels.dispatch.tuning_file import label_candidate
    from txcore.kernels.tuning import measure, timing

    if _DRY[0]:
        return _trace_cases(shape, dtype, backward, others or {}, named)
    problem, implementations = measure.problem_of(shape, dtype)
    choices = {
        label_candidate(c.implementation, fields_of(c.config)): c
        for c in _keep_first(registry.list_candidates(problem, implementations, named))
    }
    start = time.monotonic()
    calls, failed = measure.compile_calls(
        shape, dtype, choices, backward=backward, operands=operands
    )
    print(shape.name, "compiled", round(time.monotonic() - start, 1), failed, flush=True)
    with jax.default_matmul_precision("highest"):  # else float32 products would be TF32's
        # Compiled in this thread: another one would not see the context's precision.
        choice = next(c for c in choices.values() if c.implementation == "xla")
        true = measure.compile_call(shape, dtype, choice, backward=backward, operands=operands)
    truth = true()
    errors = {name: error_of(call(), truth) for name, call in calls.items()}
    calls |= others or {}
    case = f"{shape.name} {jax.numpy.dtype(dtype).name}"
    moved = shape.count_bytes(dtype, backward=backward)
    flops = shape.count_flops(backward=backward)
    rows = []
    for name, (us, count) in timing.device_times(calls, rounds).items():
        row = {
            "case": case,
            "name": name,
            "us": us,
            "kernels": count,
            "bytes": moved,
            "flops": flops,
        }
        if name in choices:
            choice = choices[name]
            row |= {"key": problem.key, "implementation": choice.implementation}
            row["config"] = fields_of(choice.config)
        if errors.get(name) is not None:
            row["error"] = errors[name]
        if hasattr(calls[name], "temp"):
            row["temp_mb"] = calls[name].temp / 1e6
        rows.append(row)
    rows += [{"case": case, "name": name, "why": why[:300]} for name, why in failed.items()]
    print(json.dumps(rows), flush=True)
    return rows


def _keep_first(choices):
    """Return of each implementation the first configurations, which are the best guesses."""
    kept = []
    for choice in choices:
        if sum(one.implementation == choice.implementation for one in kept) < MOST_CONFIGS:
            kept.append(choice)
    return kept


def _trace_cases(shape, dtype, backward, others, named):
    """Trace each candidate for an H200, and return its row, with why it could not be traced."""
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType

    from txcore.kernels.dispatch import registry
    from txcore.kernels.dispatch.tuned import fields_of
    from txcore.kernels.dispatch.tuning_file import label_candidate
    from txcore.kernels.tuning import measure

    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("i",), (AxisType.Auto,), abstract_device=device)
    case = f"{shape.name} {jax.numpy.dtype(dtype).name}"
    rows = [{"case": case, "name": name} for name in others]
    with jax.sharding.use_abstract_mesh(mesh):
        problem, implementations = measure.problem_of(shape, dtype)
        for choice in _keep_first(registry.list_candidates(problem, implementations, named)):
            row = {
                "case": case,
                "name": label_candidate(choice.implementation, fields_of(choice.config)),
            }
            try:
                forward, with_gradients = measure.write_programs(shape, choice)
                _trace_call(forward, with_gradients, shape, dtype, backward)
            except Exception as error:  # a row says so, and the others are traced
                row["why"] = f"{type(error).__name__}: {error}"[:300]
            rows.append(row)
    return rows


def _trace_call(forward, forward_and_backward, shape, dtype, backward):
    import jax

    operands = shape.make_structs(dtype)
    results = jax.eval_shape(forward, *operands)
    if backward and shape.differentiable:
        jax.eval_shape(forward_and_backward, results, *operands)


def error_of(got, truth):
    """Return the largest relative error of a leaf; None for an update, which returns nothing."""
    import jax

    if got is None or truth is None:
        return None
    return float(_largest_error(jax.tree.leaves(got), jax.tree.leaves(truth)))


def _largest_error(got, truth):
    import jax
    import jax.numpy as jnp

    @jax.jit
    def compare(got, truth):
        def compare_leaf(a, b):
            a, b = a.astype(jnp.float32).ravel(), b.astype(jnp.float32).ravel()
            norm = jnp.sqrt(jnp.sum(b * b))
            return jnp.sqrt(jnp.sum((a - b) ** 2)) / jnp.where(norm == 0, 1, norm)

        return jnp.max(jnp.stack([compare_leaf(a, b) for a, b in zip(got, truth, strict=True)]))

    if len(got) > 20:  # many arrays of one dtype: compared as one
        got, truth = ([jnp.concatenate([x.ravel() for x in xs])] for xs in (got, truth))
    return compare(got, truth)


def make_normals(shapes, dtype):
    """Return normal arrays on the device."""
    import jax

    if _DRY[0]:
        return [jax.numpy.zeros(shape, dtype) for shape in shapes]
    keys = jax.random.split(jax.random.key(7), len(shapes))
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


def max_pool(x):
    """Pool windows of 2x2 pixels."""
    import jax.numpy as jnp
    from jax import lax

    window = (1, 2, 2, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")
