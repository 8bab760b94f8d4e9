"""Traced programs as each version of jax holds them."""

import contextlib
from typing import Any


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


def spec_entries(spec: Any) -> tuple[Any, ...]:
    """Return a PartitionSpec's entry for each dim; jax 0.12 refuses to iterate unreduced ones."""
    return tuple(getattr(spec, "partitions", spec))


def current_traceback() -> Any:
    """Return where the code is that is traced now, for `called_from`; None where jax keeps none."""
    from jax._src import source_info_util  # as above

    current = getattr(source_info_util, "current", None)
    return getattr(current(), "traceback", None) if current is not None else None


def called_from(traceback: Any) -> contextlib.AbstractContextManager[Any]:
    """Let what is traced within say that it was called from elsewhere.

    What jax traces by itself (checkpoint) knows nothing of the calls around it, and its equations
    become the outer program's.
    """
    from jax._src import source_info_util  # as above

    user_context = getattr(source_info_util, "user_context", None)
    if user_context is None or traceback is None:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = user_context(traceback)
    return context


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


def plain_jaxpr(jaxpr: Any) -> Any:
    """Return a traced program with the equations of which jax hides the inside written out.

    Since 0.12 a custom_root, say, is one equation until jax lowers it.
    """
    from jax._src.interpreters import partial_eval  # private: no public name exists

    inner = getattr(jaxpr, "jaxpr", jaxpr)
    lower = getattr(partial_eval, "lower_jaxpr2", None)
    return lower(inner) if lower is not None and getattr(inner, "is_high", False) else jaxpr
