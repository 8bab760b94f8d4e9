"""jax's settings and its own state, as each version shows them."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def setting(name: str) -> Any:
    """Return one of jax's settings ("jax_platforms"); jax 0.10 does not declare them as typed."""
    return getattr(jax.config, name)


# Settings that change how jax compiles and checks, beside those that change how it traces.
_COMPILED_BY = (
    "jax_debug_infs",
    "jax_debug_nans",
    "jax_default_prng_impl",
    "jax_disable_most_optimizations",
    "jax_enable_custom_prng",
    "jax_exec_time_optimization_effort",
    "jax_memory_fitting_effort",
    "jax_memory_fitting_level",
    "jax_optimization_level",
)
# Settings that change how jax traces, for versions that do not list them.
_TRACED_BY = (
    "jax_default_matmul_precision",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
)
# Settings that jax traces by but that change no result.
_NO_RESULT = frozenset(
    [
        "jax_debug_key_reuse",
        "jax_default_device",
        "jax_enable_pgle",
        "jax_hlo_source_file_canonicalization_regex",
        "jax_pgle_profiling_runs",
    ]
)


def program_settings() -> dict[str, Any]:
    """Return jax's settings that may change a program's results, as they are in this thread."""
    from jax._src import config  # private: jax's own list of what a traced program depends on

    traced_by = getattr(config, "trace_context_names", lambda: _TRACED_BY)()
    names = {name for name in traced_by if name.startswith("jax_")} | {*_COMPILED_BY}
    found = {}
    for name in sorted(names - _NO_RESULT):
        try:
            found[name] = (
                getattr(jax.config, name) if hasattr(jax.config, name) else _read_flag(name)
            )
        except AttributeError:  # not in this jax
            continue
    return found


def thread_settings() -> tuple[Any, ...]:
    """Return what jax traces and computes by in this thread, contexts such as `enable_x64` too."""
    from jax._src import config

    context = getattr(config, "trace_context", lambda: None)()
    return context, tuple(program_settings().items())


def _read_flag(name: str) -> Any:
    return jax.config.read(name)  # some settings are no attributes


def set_if_there(name: str, value: Any) -> bool:
    """Set one of jax's settings where this jax has it; tell whether it has."""
    try:
        jax.config.update(name, value)
    except AttributeError:
        return False
    return True


def simulate_cpu_devices(count: int) -> None:
    """Make the CPU platform show `count` devices; call it before any backend starts.

    Raises:
      RuntimeError: a backend has started already.
    """
    jax.config.update("jax_num_cpu_devices", count)


def backend_started() -> bool:
    """Tell whether jax has started a backend (afterwards device counts are fixed)."""
    from jax._src import xla_bridge  # private: no public question exists on 0.10 to 0.12

    started = getattr(xla_bridge, "backends_are_initialized", None)
    return bool(started()) if started is not None else False


def may_trace() -> bool:
    """Tell whether jax may be tracing here (under jit, vmap, grad or scan)."""
    is_clean = _trace_state_clean()
    return is_clean is None or not is_clean()


@functools.cache
def _trace_state_clean() -> Callable[[], bool] | None:
    from jax._src import core  # private: there is no public question

    return getattr(core, "trace_state_clean", None)


def is_key_array(x: Any) -> bool:
    """Tell whether `x` is an array of typed PRNG keys."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def key_impl(x: Any) -> Any:
    """Return the generator of an array of PRNG keys, or of the shape of one."""
    try:
        return jax.random.key_impl(x)
    except TypeError:  # a ShapeDtypeStruct: only the dtype knows, privately
        return x.dtype._impl.name


def combiner_key(key: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which collectives are combined with those of the same key alone.

    XLA for GPU knows the key; XLA for TPU combines collectives of equal attributes. Where this jax
    has no such context, nothing is kept apart.
    """
    try:
        from jax.experimental.xla_metadata import set_xla_metadata
    except ImportError:
        return contextlib.nullcontext()
    return set_xla_metadata(combiner_key=key)


def keeps_barriers(platform: str) -> bool:
    """Tell whether XLA keeps optimization barriers until it has ordered the operations."""
    if platform == "cpu":
        return jax.__version_info__ >= (0, 11)
    return platform == "tpu"
