"""How each version of jax lowers, compiles and keeps programs."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from txcore._compat.settings import setting


@contextlib.contextmanager
def no_persistent_cache() -> Iterator[None]:
    """Compile without jax's compilation cache on disk inside this context."""
    from jax.experimental.compilation_cache import compilation_cache

    if not setting("jax_compilation_cache_dir") or not setting("jax_enable_compilation_cache"):
        yield
        return
    # jax reads the setting once per process: reset_cache makes it read it again.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


def use_persistent_cache(folder: str) -> None:
    """Keep what is compiled from now on in a folder, and take it from there.

    jax leaves names and source lines out of a program's key unless it is told to; what an audit
    reads would then be those of another program that computes the same.
    """
    from jax.experimental.compilation_cache import compilation_cache

    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_include_metadata_in_key": True,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    if all(setting(name) == value for name, value in settings.items()):
        return
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # jax reads them once per process


def compilation_seams() -> dict[str, tuple[Any, str]]:
    """Return where jax lowers, compiles, asks for its disk cache and places arrays.

    Private, since the public hook (jax.extend.xla.register_hlo_module_transformation) is given no
    traced program, turns every exception into a JaxRuntimeError, is skipped by the disk cache, and
    on 0.10 never runs for TPU and GPU targets.

    Returns:
      (owner, attribute) of each function, by what it does.

    Raises:
      RuntimeError: this jax has moved one of them.
    """
    from jax._src import compilation_cache, dispatch, pjit
    from jax._src.interpreters import pxla

    seams = {
        "lower": (pjit, "_resolve_and_lower"),
        "compile": (getattr(pxla, "MeshComputation", None), "compile"),
        "uses_disk_cache": (compilation_cache, "is_cache_used"),
        "place": (dispatch, "_device_put_impl"),
    }
    for owner, name in seams.values():
        if not callable(getattr(owner, name, None)):
            raise RuntimeError(
                f"watching compilations needs {name} of jax 0.10 to 0.12, but jax "
                f"{jax.__version__} does not have it: use an older jax, or audit the function"
            )
    return seams


def marks_partitioner() -> bool:
    """Tell whether XLA marks the collectives that its partitioner adds (since jax 0.11)."""
    return jax.__version_info__ >= (0, 11)


def array_type() -> type:
    """Return the type of jax's concrete arrays; asking for it starts no backend."""
    from jax._src import array  # private: jax.Array is the type of tracers too

    return getattr(array, "ArrayImpl", jax.Array)


def direct_call(compiled: jax.stages.Compiled) -> Callable[..., Any]:
    """Return what a compiled program that has run calls in C++, without the frame around it."""
    return getattr(compiled, "_call", None) or compiled


def executable_shardings(executable: Any) -> tuple[list[Any], list[Any]]:
    """Return the shardings of the arguments and results of what jax's lowering compiles to."""
    both = (getattr(executable, name, None) for name in ("_in_shardings", "_out_shardings"))
    arguments, results = (list(shardings or ()) for shardings in both)
    return arguments, results


def lowered_name(lowered: Any) -> str:
    """Return the name of the program that jax has lowered ("jit(step)")."""
    return str(getattr(lowered, "_name", "a program"))


def lowered_devices(lowered: Any) -> tuple[Any, ...]:
    """Return the devices that jax has lowered a program for; () where they are not known yet."""
    return tuple(getattr(lowered, "_device_list", None) or ())


def lowered_options(lowered: Any, compiler_options: Any = None, **_: Any) -> dict[str, Any]:
    """Return the compiler options of a lowered program, and those that `compile` was given."""
    return {**dict(getattr(lowered, "_compiler_options_kvs", ())), **(compiler_options or {})}


_watched = threading.local()


@contextlib.contextmanager
def compiling_watched() -> Iterator[None]:
    """Compile what `tell_of_unwatched` is not to count."""
    before, _watched.inside = getattr(_watched, "inside", False), True
    try:
        yield
    finally:
        _watched.inside = before


def tell_of_unwatched(tell: Callable[[str], None]) -> None:
    """Call `tell` with the kind of each program that gets past the seams from now on.

    "compiled": by another way than jax's lowering. "loaded": a serialized executable.
    """
    import jax.experimental.serialize_executable as serialized
    from jax import monitoring

    def count(event: str, *_: Any, **__: Any) -> None:
        is_compile = event == "/jax/core/compile/backend_compile_duration"
        if is_compile and not getattr(_watched, "inside", False):
            tell("compiled")

    monitoring.register_event_duration_secs_listener(count)
    unpickler: Any = getattr(serialized, "_JaxPjrtUnpickler", None)
    if unpickler is None:  # renamed: then loading is only seen where jax compiles, too
        return
    load = unpickler.persistent_load

    def load_told(self: Any, pid: Any) -> Any:
        if pid[0] == "exec":
            tell("loaded")
        return load(self, pid)

    unpickler.persistent_load = load_told


def mesh_device() -> tuple[str, str] | None:
    """Return (platform, device kind) of the mesh in whose context this is traced, if it says."""
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None)
    kind, platform = (getattr(device, name, None) for name in ("device_kind", "platform"))
    return (platform or _platform_of(kind), kind) if isinstance(kind, str) else None


def _platform_of(device_kind: str) -> str:
    """Return the platform of a device kind, where an abstract device does not name it."""
    kind = device_kind.lower()
    return "cpu" if kind == "cpu" else "tpu" if kind.startswith("tpu") else "gpu"
