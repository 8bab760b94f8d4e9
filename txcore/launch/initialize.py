"""Joining the processes of one run."""

import jax

from txcore import _compat


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_s: int = 300,
) -> None:
    """Join the processes of one run; call it first, before jax touches a device.

    On CPU the collectives go through gloo, on GPU through NCCL.

    Args:
      coordinator: "host:port" of process 0, the same for all; a coordinator on the loopback
        interface listens there only. With all three None the cluster (SLURM, Open MPI,
        Kubernetes, TPU pods) is detected by jax.
      num_processes: how many processes there are.
      process_id: which one this is, from 0.
      timeout_s: seconds to wait for the others.

    Raises:
      ValueError: only some of the three are given, or they do not fit together.
      RuntimeError: a backend has started already, or the others did not come in time.

    Example:
      >>> tx.initialize("127.0.0.1:12345", num_processes=2, process_id=2)
      Traceback (most recent call last):
      ...
      ValueError: tx.initialize needs process_id= from 0 to 1 for num_processes=2, got 2
    """
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise ValueError(
            f"tx.initialize needs coordinator=, num_processes= and process_id= together (or none "
            f"of them, to detect the cluster), but {', '.join(missing)} is missing"
        )
    if not missing:
        _check(str(coordinator), int(num_processes or 0), int(process_id or 0))
    if _compat.backend_started():
        raise RuntimeError(
            "tx.initialize needs to come before jax touches a device (jax.devices(), any array), "
            "but a backend has started already: call it first"
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    host = (coordinator or "").rpartition(":")[0]
    local = host.startswith("127.") or host in ("localhost", "[::1]")
    jax.distributed.initialize(
        coordinator_address=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        initialization_timeout=timeout_s,
        coordinator_bind_address=coordinator if local else None,
    )


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(f"tx.initialize needs coordinator= 'host:port', got {coordinator!r}")
    if num_processes < 1:
        raise ValueError(f"tx.initialize needs num_processes= at least 1, got {num_processes}")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"tx.initialize needs process_id= from 0 to {num_processes - 1} for {num_processes=}, "
            f"got {process_id}"
        )
