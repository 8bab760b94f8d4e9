"""Join the processes of one run."""

import contextlib
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from txcore import _compat
from txcore.launch import watch
from txcore.launch.join import addresses, gathering, rendezvous
from txcore.launch.join.cluster import VARIABLES, cluster, run_of

_LOG = logging.getLogger("txcore")

JOINED = "txcore/joined/"  # the keys under which each process stores the start's token
JOIN_S = 30.0  # for all processes that have met to join jax's service


class Place(NamedTuple):
    """Hold the place of this process in its run.

    Attributes:
      address: "host:port" of the coordinator.
      size: the number of processes.
      rank: the number of this process, from 0.
      devices: the GPUs that it uses of those it sees; None for all.
      run: the run's id; None without one.
    """

    address: str
    size: int
    rank: int
    devices: tuple[int, ...] | None = None
    run: str | None = None


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_s: float = 300,
    heartbeat_timeout_s: float = 100,
    peer_timeout_s: float = 10.0,
    step_timeout_s: float = 600.0,
    local_device_ids: int | Sequence[int] | None = None,
) -> None:
    """Join the processes of one run; call it first, before jax touches a device.

    Without the first three arguments, `launch.cluster()` finds their values: in the variables that
    `txcore launch` or torchrun sets, or from SLURM, Open MPI, Kubernetes or a TPU pod. If it finds
    nothing, this process is alone, and there is nothing to join. On CPU the collectives go through
    gloo, on GPU through NCCL. Nothing listens on an address but the coordinator's, and on
    each host the one that leads there; on loopback where the coordinator is.

    Args:
      coordinator: "host:port" of process 0, the same for all.
      num_processes: the number of processes.
      process_id: the number of this process, from 0.
      timeout_s: seconds to wait for the others. Process 0 tries three times to listen, the others
        again and again to reach it.
      heartbeat_timeout_s: seconds without a sign of life after which jax takes a process for dead.
      peer_timeout_s, step_timeout_s: seconds after which a silent rank counts as lost, and that
        a step of `Engine.fit` may take: then all ranks end and say why (`launch.watch.start`).
      local_device_ids: which of the GPUs that this process sees are its own. By default, under
        SLURM, Open MPI and torchrun, an equal share of those that all processes of a host see
        (`launch.cluster()` tells), and else all.

    Raises:
      ValueError: only some of the three are given, they or the variables do not fit together, a
        variable names an interface that this host does not have, or a timeout is not above 0.
      RuntimeError: a backend has started already, it was called before, or a process did not come
        in time (the message says which).

    Example:
      >>> tx.initialize()  # alone: the run is this one process
      >>> tx.initialize("127.0.0.1:12345", num_processes=2, process_id=2)
      Traceback (most recent call last):
      ...
      ValueError: tx.initialize needs process_id= from 0 to 1 for num_processes=2, got 2
    """
    place = _read_arguments(coordinator, num_processes, process_id)
    _check_timeouts(
        timeout_s=timeout_s,
        heartbeat_timeout_s=heartbeat_timeout_s,
        peer_timeout_s=peer_timeout_s,
        step_timeout_s=step_timeout_s,
    )
    place = place or _detect_place(round(timeout_s))
    if place is None:
        _run_alone(local_device_ids)
        return
    _refuse_late()
    address, size, rank, ours, run = place
    addresses.check_interfaces()
    addresses.bypass_proxies(addresses.split_address(address)[0], os.environ)
    started = time.monotonic()
    try:
        met = _meet_others(address, size, rank, started + timeout_s, run)
    except rendezvous.NotTogether as error:
        raise RuntimeError(
            f"tx.initialize of process {rank} of {size} at {address}: {error}; waited "
            f"{time.monotonic() - started:.0f} s of timeout_s={timeout_s:g}"
        ) from None
    _configure_jax(address)
    jax.distributed.initialize(
        address,
        size,
        rank,
        local_device_ids=ours if local_device_ids is None else local_device_ids,
        cluster_detection_method="deactivate",  # done
        initialization_timeout=max(30, round(timeout_s)),
        heartbeat_timeout_seconds=math.ceil(heartbeat_timeout_s),
        coordinator_bind_address=met.bind,
    )
    _check_all_have_met(rank, size, met.token, min(timeout_s, JOIN_S))
    watch.start(peer_timeout_s=peer_timeout_s, step_timeout_s=step_timeout_s)
    if met.host is not None and met.bind is not None:
        closed = met.host.answer_newcomers(addresses.split_address(met.bind)[1], watch.hear_of_end)
        if not closed and sys.platform == "linux":
            _LOG.warning("txcore: the coordinator's port %s stays open to strangers", met.bind)
    if met.seat is not None:
        met.seat.connection.close()


def _read_arguments(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Place | None:
    """Return the place that the arguments give, or None without any."""
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        return None
    if missing:
        raise ValueError(
            f"tx.initialize needs coordinator=, num_processes= and process_id= together (or none "
            f"of them, to detect the cluster), but {', '.join(missing)} is missing"
        )
    return _check_place(coordinator, num_processes, process_id)


def _check_place(
    coordinator: Any, size: Any, rank: Any, devices: Any = None, run: str | None = None
) -> Place:
    """Return the place of these values; refuse values that do not fit together."""
    try:
        addresses.split_address(coordinator)
    except ValueError:
        raise ValueError(
            f"tx.initialize needs coordinator= 'host:port', got {coordinator!r}"
        ) from None
    if size < 1:
        raise ValueError(f"tx.initialize needs num_processes= at least 1, got {size}")
    if not 0 <= rank < size:
        raise ValueError(
            f"tx.initialize needs process_id= from 0 to {size - 1} for num_processes={size}, "
            f"got {rank}"
        )
    if run is None:
        run = run_of(os.environ, coordinator)
    return Place(coordinator, size, rank, devices, run)


def _check_timeouts(**timeouts: float) -> None:
    for name, seconds in timeouts.items():
        if not 0 < seconds < math.inf:
            raise ValueError(f"tx.initialize needs {name}= above 0 seconds, got {seconds}")


def _refuse_late() -> None:
    if _compat.coordination_client() is not None:
        raise RuntimeError(
            "tx.initialize needs to be called once, but this process has joined its run already: "
            "leave the second call out"
        )
    if _compat.backend_started():
        raise RuntimeError(
            "tx.initialize needs to come before jax touches a device (jax.devices(), any array), "
            "but a backend has started already: call it first"
        )


def _run_alone(local_device_ids: int | Sequence[int] | None) -> None:
    """Prepare a run of one process: restrict jax to the GPUs that are named."""
    if local_device_ids is None and _compat.coordination_client() is None:
        return
    _refuse_late()
    ids = [local_device_ids] if isinstance(local_device_ids, int) else local_device_ids or ()
    for platform in ("cuda", "rocm"):  # as jax.distributed.initialize does
        _compat.set_if_there(f"jax_{platform}_visible_devices", ",".join(map(str, ids)))


def _detect_place(timeout_s: int) -> Place | None:
    """Return the place that the environment gives, or None if this process is alone."""
    found = cluster()
    if found is None:
        return None
    _refuse_late()  # before jax asks the network
    values: tuple[Any, ...] = (found.coordinator, found.num_processes, found.process_id)
    if None in values:
        asked = _compat.detect_cluster(timeout_s) or (None, None, None)
        values = tuple(a if b is None else b for a, b in zip(asked, values, strict=True))
    if None in values:
        raise ValueError(
            f"tx.initialize found {found.name}, but jax {jax.__version__} does not find the "
            f"coordinator's address, the number of processes and this one's id there, only "
            f"{values}: set {', '.join(VARIABLES)}"
        )
    address, size, rank = values
    return _check_place(address, size, rank, found.local_device_ids, found.run)


class Met(NamedTuple):
    """Hold what a process needs from the meeting until jax has joined all.

    Attributes:
      token: names this start.
      bind: where the coordinator listens; on process 0.
      host: on process 0.
      seat: on the others.
    """

    token: str
    bind: str | None = None
    host: gathering.Host | None = None
    seat: rendezvous.Seat | None = None


def _meet_others(
    address: str, size: int, rank: int, deadline: float, run: str | None = None
) -> Met:
    """Wait until all processes have met."""
    if rank:
        seat = rendezvous.join_meeting(address, rank, size, deadline, run)
        rendezvous.wait_until_served(address, deadline, seat)
        return Met(seat.token, seat=seat)
    bind = _requested_bind() or _own_address(address, deadline)
    listener = rendezvous.listen_alone(bind, deadline, rendezvous.make_greeting(rank, size, run))
    host = gathering.Host(listener, size, socket.gethostname(), run)
    try:
        host.gather_all(deadline)
        return Met(host.token, bind, host)
    except rendezvous.NotTogether as error:
        given, found = (addresses.split_address(a)[0] for a in (address, bind))
        if not addresses.is_loopback(found) or addresses.is_loopback(given) or given == "localhost":
            raise
        raise rendezvous.NotTogether(
            f"{error}; only this host's own processes can: its name {given} means {found} here, "
            "so give the coordinator as an address that the others can reach"
        ) from None


def _check_all_have_met(rank: int, size: int, token: str, timeout_s: float) -> None:
    """Refuse a run if jax's service has admitted a process that was not at the meeting."""
    client = _compat.coordination_client()
    if client is None or size == 1:
        return
    client.key_value_set(f"{JOINED}{rank}", token)
    with contextlib.suppress(RuntimeError):  # a stranger does not come to the barrier
        client.wait_at_barrier(f"{JOINED}all", int(timeout_s * 1000))
    shown = dict(client.key_value_dir_get(JOINED))
    strange = [r for r in range(size) if shown.get(f"{JOINED}{r}") != token]
    if strange:
        raise RuntimeError(
            f"tx.initialize of process {rank} of {size} needs every process of jax's coordination "
            f"service to be of this run, but {rendezvous.name_processes(strange)} joined "
            "without having met process 0: end what else connects to this port, or take another "
            "port"
        )


def _requested_bind() -> str | None:
    given = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or None
    try:
        return given and addresses.join_address(*addresses.split_address(given))
    except ValueError:
        raise ValueError(
            f"tx.initialize needs JAX_COORDINATOR_BIND_ADDRESS 'host:port', got {given!r}"
        ) from None


def _own_address(address: str, deadline: float) -> str:
    """Return the coordinator's numeric address; wait for a name that does not resolve yet."""
    host, port = addresses.split_address(address)
    while True:
        try:
            return addresses.join_address(addresses.resolve_host(host, port), port)
        except (OSError, UnicodeError) as error:
            if time.monotonic() + 1 > deadline or isinstance(error, UnicodeError):
                reason = getattr(error, "strerror", None) or error
                raise rendezvous.NotTogether(
                    f"process 0 cannot find its own address: {host} is unknown ({reason})"
                ) from None
        time.sleep(1)


def _configure_jax(address: str) -> None:
    """Set up jax for several processes."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # jax would warn of proxies, from which `bypass_proxies` has excluded the coordinator.
    _compat.set_if_there("jax_check_proxy_envs", False)
    # jax's preemption service would replace handlers of SIGTERM and swallow the signal.
    _compat.set_if_there("jax_enable_preemption_service", False)
    interface = os.environ.get("GLOO_SOCKET_IFNAME") or None
    own = None if interface else addresses.address_towards(*addresses.split_address(address))
    _compat.listen_with_gloo_at(own, interface)
    # A rank's death then raises an error in the others, which name it and choose their exit code.
    _compat.set_if_there("jax_enable_recoverability", True)
