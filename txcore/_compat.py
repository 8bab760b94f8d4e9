"""Every difference between the supported jax versions (0.10 to 0.12), and nothing else."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# The frontend attribute that held the tags before: a dump that was kept may have it.
TAG_KEY = "txcore"
_TAG = re.compile(r"txcore\[([A-Za-z0-9_./-]+)\]")


def varying_axes(x: Any) -> frozenset[str]:
    """Return the mesh axes along which the type of `x` says that it varies."""
    return varying_axes_of(jax.typeof(x))


def varying_axes_of(aval: Any) -> frozenset[str]:
    """Return the mesh axes along which an array type says that its values vary."""
    manual = getattr(aval, "manual_axis_type", None)
    if manual is not None:
        return frozenset(manual.varying)
    return frozenset(getattr(aval, "vma", None) or ())


def unreduced_axes(x: Any) -> frozenset[str]:
    """Return the mesh axes along which each device holds one part of `x`, yet to be reduced."""
    return frozenset(getattr(_axis_type(x), "unreduced", ()))


def equal_reduced_axes(x: Any) -> frozenset[str]:
    """Return the mesh axes along which `x` is equal and its cotangent is unreduced ("reduced")."""
    return frozenset(getattr(_axis_type(x), "reduced", ()))


def unreduced_kind(x: Any) -> str:
    """Return how the parts of an unreduced value are reduced: "sum", or since jax 0.11 "max"."""
    kind = getattr(_axis_type(x), "unreduced_kind", None)
    return getattr(kind, "name", "sum")


def _axis_type(x: Any) -> Any:
    return getattr(jax.typeof(x), "manual_axis_type", None)


def cast_to_varying(x: Any, axes: tuple[str, ...]) -> jax.Array:
    """Cast one array to vary along `axes`, none of which it varies along yet."""
    reduced = equal_reduced_axes(x)
    for same_state in ([a for a in axes if a not in reduced], [a for a in axes if a in reduced]):
        if same_state:  # jax casts from one state at a time
            x = lax.pcast(x, tuple(same_state), to="varying")
    return x


def cast_to_unreduced(x: Any, axes: tuple[str, ...]) -> jax.Array:
    """Cast one array that varies along `axes` to be unreduced along them: parts of a sum."""
    return lax.pcast(x, axes, to="unreduced")


def tracks_varying(axis: str) -> bool:
    """Tell whether jax tracks varying axes here (not under check_vma=False or vmap)."""
    # The index along an axis varies along it by definition: if its type does not say so,
    # nothing's type does.
    if axis not in bound_axes():  # an axis of vmap: its index is typed, its data is not
        return False
    index = jax.eval_shape(lambda: lax.axis_index(axis))
    return axis in varying_axes(index)


def axis_size(axis: str) -> int | None:
    """Return the size of mesh axis `axis`, or None where it is not bound."""
    try:
        return int(lax.axis_size(axis))
    except NameError:
        return None


def all_gather_invariant(x: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    """Gather shards that vary along `axes`; the result is typed as invariant where jax tracks."""
    # jax 0.10 refuses to="invarying" under vmap, where nothing is tracked.
    to = "invarying" if set(axes) <= varying_axes(x) else "varying"
    return lax.all_gather(x, axes, axis=dim, tiled=True, to=to)


def bound_axes() -> tuple[str, ...]:
    """Return the mesh axes that are bound (manual) where this is called, in the mesh's order."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = getattr(mesh, "manual_axes", ())
    return tuple(str(a) for a in mesh.axis_names if a in manual)


def tag_scope(tag: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which operations carry `tag` in their path of scopes, HLO's op_name.

    It is no frontend attribute: XLA for TPU combines only collectives whose attributes are equal.
    """
    return jax.named_scope(f"txcore[{tag}]")


def tags_in(path: str) -> tuple[str, ...]:
    """Return txcore's tags in a path of scopes, each once; several where ops were merged."""
    return tuple(dict.fromkeys(_TAG.findall(path)))


def tag_in(path: str) -> str | None:
    """Return the innermost of txcore's tags in a traced equation's path, or None."""
    tags = tags_in(path)
    return tags[-1] if tags else None


def setting(name: str) -> Any:
    """Return one of jax's settings ("jax_platforms"); jax 0.10 does not declare them as typed."""
    return getattr(jax.config, name)


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


def is_vmapped(x: Any) -> bool:
    """Tell whether `x` is one row of what jax.vmap goes over, as far as this jax shows it."""
    from jax._src.interpreters import batching  # private: no public question exists

    tracer = getattr(batching, "BatchTracer", ())
    while x is not None and not isinstance(x, tracer):
        x = getattr(x, "primal", None)  # under differentiation
    return x is not None


def match_varying(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Cast every array to vary along the union of the axes that any of them varies along.

    custom_vjp and pallas_call refuse operands whose varying axes differ; this is the one
    place where they are made to agree. The transpose of such a cast is a psum without a tag
    ("autodiff" in an audit): cast parameters with `tx.vary` first to have it tagged.
    """
    union = frozenset[str]().union(*(varying_axes(a) for a in arrays))
    return tuple(
        cast_to_varying(a, tuple(sorted(union - varying_axes(a)))) if union - varying_axes(a) else a
        for a in arrays
    )


def coordination_client() -> Any:
    """Return the client of the processes' coordination service, or None for a single process.

    Raises:
      RuntimeError: several processes run, but this jax does not show its client.
    """
    from jax._src import distributed  # private: the public way starts the backend

    state = getattr(distributed, "global_state", None)
    client = getattr(state, "client", None)
    if client is None and backend_started() and jax.process_count() > 1:
        raise RuntimeError(f"jax {jax.__version__} does not show its coordination service")
    return client


def coordination_rank() -> int:
    """Return this process's id without starting a backend."""
    from jax._src import distributed

    return int(getattr(getattr(distributed, "global_state", None), "process_id", None) or 0)


def coordination_size() -> int:
    """Return the number of processes of the run without starting a backend."""
    from jax._src import distributed

    return int(getattr(getattr(distributed, "global_state", None), "num_processes", None) or 1)


def coordinator_address() -> str | None:
    """Return "host:port" of the processes' coordination service, or None if it is not known."""
    from jax._src import distributed

    return getattr(getattr(distributed, "global_state", None), "coordinator_address", None)


def on_tpu_vm() -> bool:
    """Tell whether jax takes this machine for a host of Cloud TPUs."""
    from jax._src import cloud_tpu_init  # private, as is all that jax knows of clusters

    return bool(getattr(cloud_tpu_init, "running_in_cloud_tpu_vm", False))


def detect_cluster(timeout_s: int) -> tuple[str, int, int] | None:
    """Return the coordinator's address, the number of processes and this one, as jax finds them."""
    from jax._src import clusters

    environment = getattr(clusters, "ClusterEnv", None)
    detect = getattr(environment, "auto_detect_unset_distributed_params", None)
    if detect is None:
        return None
    coordinator, count, rank, _ = detect(None, None, None, [], None, timeout_s)
    return None if None in (coordinator, count, rank) else (coordinator, int(count), int(rank))


def listen_with_gloo_at(hostname: str | None, interface: str | None) -> bool:
    """Have gloo listen at an address or interface; jax would take the hostname's address.

    Call it before the backend starts.

    Returns:
      Whether this jax can be told.
    """
    from jax._src import distributed, xla_bridge
    from jax._src.lib import _jax

    connect = getattr(_jax, "make_gloo_tcp_collectives", None)
    register = getattr(xla_bridge, "register_backend_factory", None)
    make_client = getattr(xla_bridge, "make_cpu_client", None)
    if connect is None or register is None or make_client is None:
        return False

    def make() -> Any:
        client = distributed.global_state.client
        if client is None:  # alone again
            return make_client()
        return make_client(connect(client, hostname=hostname, interface=interface))

    register("cpu", make, priority=0, fail_quietly=False)
    return True


def eqn_name_stack(eqn: Any) -> str:
    """Return the path of jax transformations that made an equation ("transpose(jvp())")."""
    return str(getattr(eqn.source_info, "name_stack", ""))


def eqn_frames(eqn: Any) -> tuple[tuple[str, int], ...]:
    """Return (file, line) of the calls that made an equation, innermost first, jax's left out."""
    from jax._src import source_info_util  # private: no public way to a source line exists

    user_frames = getattr(source_info_util, "user_frames", None)
    traceback = getattr(eqn.source_info, "traceback", None)
    if user_frames is None or traceback is None:
        return ()
    return tuple((str(f.file_name), int(f.start_line)) for f in user_frames(traceback))


def eqn_collective(eqn: Any) -> str | None:
    """Return the function of jax.lax's collectives that made an equation ("psum"), "" for none.

    An equation that transposes another has its traceback. None where jax does not keep any.
    """
    frames = getattr(getattr(eqn.source_info, "traceback", None), "frames", None)
    if frames is None:
        return None
    for frame in frames:
        path = frame.file_name.replace("\\", "/")
        if path.endswith("jax/_src/lax/parallel.py"):
            return str(frame.function_name)
        if "/jax/" not in path:
            return ""
    return ""


def live_jaxpr(jaxpr: Any) -> Any:
    """Return a jaxpr without the equations whose results nothing uses."""
    from jax.interpreters import partial_eval

    dce = getattr(partial_eval, "dce_jaxpr", None)
    return dce(jaxpr, [True] * len(jaxpr.outvars))[0] if dce is not None else jaxpr


def scan_counts(eqn: Any) -> tuple[int, int]:
    """Return how many of a scan equation's inputs are constants, and how many its carry."""
    if "ft_in" in eqn.params:  # since 0.11 a tree of (constants, carry, scanned)
        constants, carry, _ = map(list, eqn.params["ft_in"].unpack())
        return len(constants), len(carry)
    return int(eqn.params["num_consts"]), int(eqn.params["num_carry"])


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


def executable_shardings(executable: Any) -> tuple[list[Any], list[Any]]:
    """Return the shardings of the arguments and results of what jax's lowering compiles to."""
    both = (getattr(executable, name, None) for name in ("_in_shardings", "_out_shardings"))
    arguments, results = (list(shardings or ()) for shardings in both)
    return arguments, results


def lowered_name(lowered: Any) -> str:
    """Return the name of the program that jax has lowered ("jit(step)")."""
    return str(getattr(lowered, "_name", "a program"))


def plain_jaxpr(jaxpr: Any) -> Any:
    """Return a traced program with the equations of which jax hides the inside written out.

    Since 0.12 a custom_root, say, is one equation until jax lowers it.
    """
    from jax._src.interpreters import partial_eval  # private: no public name exists

    inner = getattr(jaxpr, "jaxpr", jaxpr)
    lower = getattr(partial_eval, "lower_jaxpr2", None)
    return lower(inner) if lower is not None and getattr(inner, "is_high", False) else jaxpr


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


def shape_like(x: Any, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Return the type of a kernel's result: of this shape, varying along the same axes as `x`."""
    axes = getattr(jax.typeof(x), "manual_axis_type", None)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)


def run_untracked(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """Call a function whose inside does not say what varies; its results vary as the arrays do.

    An interpreted Pallas kernel is such a function: jax traces it without varying axes, and then
    refuses to run that on operands that have some (its loops' carries and literals have none).
    Not to be differentiated, and without collectives: call it inside a custom VJP.

    Args:
      function: called with the arrays; returns a pytree of arrays.
      *arrays: operands that vary along the same axes (`match_varying`).

    Returns:
      What the function returns, cast to vary along the arrays' axes.
    """
    axes = tuple(sorted(frozenset[str]().union(*(varying_axes(a) for a in arrays))))
    if not axes:
        return function(*arrays)
    results = function(*(claim(a, "", (), drop=axes) for a in arrays))
    return jax.tree.map(lambda result: cast_to_varying(result, axes), results)


CLAIM = "claim"


def claim(
    x: jax.Array,
    kind: str,
    axes: tuple[str, ...],
    *,
    what: str = "",
    error: str = "",
    add: Iterable[str] = (),
    drop: Iterable[str] = (),
) -> jax.Array:
    """Return `x`, of which a traced program then says something that can be checked.

    Nothing is left of it in the compiled program. Its transpose is itself, without the claim.

    Args:
      x: an array.
      kind: what is claimed along each of the axes: "equal" (all devices hold the same), "differs",
        "whole" (it is not made of one slice of what a loop goes over), "" for nothing.
      axes: mesh axes.
      what: what errors call the value.
      error: the text of the error where the claim is false; "{axis}" stands for the axes along
        which it is, "{source}" for the line that made it.
      add: axes along which the result is typed as varying.
      drop: axes along which the result is typed as invariant.
    """
    return _claim().bind(
        *(x,),
        **{"kind": kind, "mesh_axes": axes, "what": what, "error": error},
        **{"add": tuple(sorted(add)), "drop": tuple(sorted(drop))},
    )


@functools.cache
def _claim() -> Any:
    from jax.extend.core import Primitive
    from jax.interpreters import ad, batching, mlir

    claim = Primitive(CLAIM)
    claim.def_impl(lambda x, **_: x)
    claim.def_abstract_eval(_retyped)
    mlir.register_lowering(claim, lambda ctx, x, **_: [x])
    batching.primitive_batchers[claim] = lambda args, dims, **params: (
        claim.bind(args[0], **params),
        dims[0],
    )
    ad.deflinear2(claim, _transposed_claim)
    return claim


def _retyped(aval: Any, *, add: tuple[str, ...], drop: tuple[str, ...], **_: Any) -> Any:
    if not add and not drop:
        return aval
    axis_type = aval.manual_axis_type
    varying = (axis_type.varying | set(add)) - set(drop)
    # A callback's result has no mesh yet, as a type that varies needs.
    return aval.update(
        sharding=aval.sharding.update(mesh=jax.sharding.get_abstract_mesh()),
        manual_axis_type=axis_type.update(varying=varying, reduced=axis_type.reduced - set(add)),
    )


def _transposed_claim(cotangent: Any, _: Any, **params: Any) -> list[Any]:
    from jax.interpreters import ad

    if type(cotangent) is ad.Zero:
        return [cotangent]
    return [claim(cotangent, "", (), add=params["drop"], drop=params["add"])]


def needed(jaxpr: Any, outputs: list[bool]) -> tuple[bool, list[bool]]:
    """Tell what the chosen outputs of a traced program are made of.

    Args:
      jaxpr: a Jaxpr or ClosedJaxpr.
      outputs: for each output whether it is meant.

    Returns:
      Whether computing them takes any operation at all, and for each input whether they need it
      (or may: what jax does not see through counts as needing everything).
    """
    from jax.interpreters import partial_eval

    live, used = partial_eval.dce_jaxpr(getattr(jaxpr, "jaxpr", jaxpr), outputs)
    bodies = [getattr(eqn.params.get("jaxpr"), "eqns", [eqn]) for eqn in live.eqns]
    computes = any(eqn.primitive.name != CLAIM for body in bodies for eqn in body)
    return computes, used
