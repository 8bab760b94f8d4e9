"""The coordination service and clusters of processes, as each version of jax shows them."""

from typing import Any

import jax

from txcore._compat.settings import backend_started


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

    def make_with_gloo() -> Any:
        client = distributed.global_state.client
        if client is None:  # a single process after a shutdown
            return make_client()
        return make_client(connect(client, hostname=hostname, interface=interface))

    register("cpu", make_with_gloo, priority=0, fail_quietly=False)
    return True
