"""Which cluster this process was started in, read from its environment: nothing is started."""

import itertools
import os
import re
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from txcore import _compat

# What says where a process belongs: `txcore launch` sets all three, jax reads the first.
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Jobs that are given no port take one of the last 4096: Linux gives these to nobody by itself.
_FIRST_PORT, _PORTS = 2**16 - 2**12, 2**12
# SLURM's "steps" that are no srun: the batch script, an salloc shell, a container's pause.
_FIRST_SPECIAL_STEP = 2**32 - 2**8
_VISIBLE_GPUS = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


class Cluster(NamedTuple):
    """What a process knows of its run before it starts.

    Attributes:
      name: what started it: "environment", "SLURM", "Open MPI", "Kubernetes" or "TPU pod".
      coordinator: "host:port" of process 0; None where only jax can find out.
      num_processes: how many processes there are; None where only jax can find out.
      process_id: which one this is, from 0; None where only jax can find out.
      local_device_ids: which of the GPUs it sees are this process's own; None for all of them.
    """

    name: str
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None


def cluster(environ: Mapping[str, str] | None = None) -> Cluster | None:
    """Return what `tx.initialize()` without arguments would use, without starting anything.

    The first that is there: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (set by
    `txcore launch`), Open MPI's mpirun, SLURM's srun, a TPU pod, an indexed Kubernetes job. A
    shell within a SLURM job (salloc, or the batch script itself) is no process of a run.

    Args:
      environ: the environment variables; this process's by default.

    Returns:
      What was found, or None: this process is alone.

    Raises:
      ValueError: the variables contradict each other, or are no numbers.

    Example:
      >>> from txcore import launch
      >>> launch.cluster({})
      >>> launch.cluster(
      ...     {
      ...         "JAX_COORDINATOR_ADDRESS": "127.0.0.1:12345",
      ...         "JAX_NUM_PROCESSES": "2",
      ...         "JAX_PROCESS_ID": "1",
      ...     }
      ... ).process_id
      1
    """
    environ = os.environ if environ is None else environ
    if all(environ.get(name) for name in VARIABLES):
        count, rank = (_number(environ, name) for name in VARIABLES[1:])
        return Cluster("environment", environ[VARIABLES[0]], count, rank)
    found = _open_mpi(environ) or _slurm(environ) or _found_by_jax(environ)
    own = environ.get(VARIABLES[0])
    if found is not None:
        _check_agrees(environ, found)
        return found._replace(coordinator=own) if own else found
    if own or any(environ.get(name) for name in VARIABLES[1:]):
        missing = [name for name in VARIABLES if not environ.get(name)]
        there = [name for name in VARIABLES if environ.get(name)]
        raise ValueError(
            f"{', '.join(there)} say(s) that this process is one of several, which needs "
            f"{' and '.join(missing)} too (`txcore launch` sets all three): set what is missing, "
            "or unset the rest"
        )
    return None


def _check_agrees(environ: Mapping[str, str], found: Cluster) -> None:
    for name, value in zip(VARIABLES[1:], (found.num_processes, found.process_id), strict=True):
        if environ.get(name) and value not in (None, _number(environ, name)):
            raise ValueError(
                f"{name}={environ[name]} contradicts {found.name}, by which it is {value}: unset "
                f"it, or set all of {', '.join(VARIABLES)}"
            )


def _open_mpi(environ: Mapping[str, str]) -> Cluster | None:
    if "OMPI_COMM_WORLD_RANK" not in environ or "OMPI_COMM_WORLD_SIZE" not in environ:
        return None
    size, rank = (_number(environ, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK"))
    local_size = int(environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", size))
    local_rank = int(environ.get("OMPI_COMM_WORLD_LOCAL_RANK", rank))
    host: str | None = "127.0.0.1"
    if local_size < size:
        # mpirun's own addresses, before Open MPI 5; it starts rank 0 where it runs itself.
        uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
        found = re.search(r"tcp://([^,:]+)|tcp6://(\[[^],]+)", uri)
        host = (found[1] or found[2] + "]") if found else None
    job = environ.get("PMIX_NAMESPACE", "")
    port = _port(environ, zlib.crc32(job.encode()))
    devices = local_devices(environ, local_rank, local_size)
    return Cluster("Open MPI", f"{host}:{port}" if host else None, size, rank, devices)


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
    needed = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID")
    if any(name not in environ for name in (*needed, "SLURM_STEP_NUM_TASKS")):
        return None
    job, step = (_number(environ, name) for name in needed[:2])
    if step >= _FIRST_SPECIAL_STEP:
        return None
    tasks = tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    host = "127.0.0.1" if len(tasks) == 1 else first_host(environ["SLURM_STEP_NODELIST"])
    node = int(environ.get("SLURM_NODEID", "0"))
    here = tasks[node] if node < len(tasks) else 1
    return Cluster(
        "SLURM",
        f"{host}:{_port(environ, job + 1009 * step)}",  # steps of one job may run side by side
        _number(environ, "SLURM_STEP_NUM_TASKS"),
        _number(environ, "SLURM_PROCID"),
        local_devices(environ, int(environ.get("SLURM_LOCALID", "0")), here),
    )


def _found_by_jax(environ: Mapping[str, str]) -> Cluster | None:
    """Tell where jax is to find out the rest, which takes questions over the network."""
    if _compat.on_tpu_vm() and "TPU_SKIP_MDS_QUERY" not in environ:
        return Cluster("TPU pod")
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return Cluster("Kubernetes")
    return None


def local_devices(
    environ: Mapping[str, str], local_rank: int, local_size: int
) -> tuple[int, ...] | None:
    """Return which of the GPUs that a process sees it takes; None for all.

    All if it is the only process of its host, or if it was given its own (`--gpus-per-task`).
    Where every process of the host sees the same N, an equal share; where N is not known, one.

    Args:
      environ: the environment variables.
      local_rank: which process of its host this is, from 0.
      local_size: how many there are on its host.

    Example:
      >>> from txcore.launch.cluster import local_devices
      >>> local_devices({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 1, 2)
      (2, 3)
    """
    visible = next((environ[name] for name in _VISIBLE_GPUS if environ.get(name)), None)
    if local_size == 1 or environ.get("JAX_LOCAL_DEVICE_IDS"):  # jax reads that itself
        return None
    if visible is None:
        return (local_rank,)
    count = len(visible.split(","))
    if (
        count < local_size
        or environ.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2] == f"{count}"
    ):
        return None
    share = count // local_size
    return tuple(range(local_rank * share, (local_rank + 1) * share))


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM node list.

    Example:
      >>> from txcore.launch.cluster import first_host
      >>> first_host("gpu[007-012,020],login1")
      'gpu007'
    """
    name = re.match(r"(?:\[[^]]*\]|[^],\[])*", nodes)
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", name[0] if name else nodes)


def tasks_per_node(text: str) -> list[int]:
    """Return the number of tasks on each node, as SLURM writes it.

    Example:
      >>> from txcore.launch.cluster import tasks_per_node
      >>> tasks_per_node("4(x2),3")
      [4, 4, 3]
    """
    pairs = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return list(itertools.chain(*([int(tasks)] * int(times or 1) for tasks, times in pairs)))


def _port(environ: Mapping[str, str], job: int) -> int:
    """Return the coordinator's port: the one that was asked for, or one of this job's number."""
    if environ.get("JAX_COORDINATOR_PORT"):
        return _number(environ, "JAX_COORDINATOR_PORT")
    return _FIRST_PORT + job % _PORTS


def _number(environ: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"\d+", environ[name]):
        raise ValueError(f"{name} must be a number from 0 on, got {environ[name]!r}")
    return int(environ[name])
