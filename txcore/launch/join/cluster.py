"""Detect from the environment which cluster started this process; start nothing."""

import itertools
import os
import re
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from txcore import _compat
from txcore.launch.join import addresses
from txcore.launch.join.rendezvous import RUN_VARIABLE

# The variables that place a process in a run: `txcore launch` sets all three, jax reads the first.
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# The same by torchrun's names, which many launchers set as well.
TORCH_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
_TORCHRUN = "TORCHELASTIC_RUN_ID"  # it alone sets this one
# Jobs without a given port take one of the last 4096, which Linux does not hand out by itself.
_FIRST_PORT, _PORTS = 2**16 - 2**12, 2**12
# The step numbers of what SLURM starts without srun: the batch script, an salloc shell, a pause.
_FIRST_SPECIAL_STEP = 2**32 - 2**8
_VISIBLE_GPUS = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


class Cluster(NamedTuple):
    """Describe the run that a process was started for.

    Attributes:
      name: what started the run: "environment", "torchrun", "Open MPI", "SLURM", "Kubernetes" or
        "TPU pod".
      coordinator: "host:port" of process 0; None if only jax can find out.
      num_processes: the number of processes; None if only jax can find out.
      process_id: the number of this process, from 0; None if only jax can find out.
      local_device_ids: the GPUs that this process uses of those it sees; None for all of them.
      run: an id that this run's processes share, and no other run has; None without one.
    """

    name: str
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None
    run: str | None = None


def run_of(environ: Mapping[str, str], coordinator: str | None) -> str | None:
    """Return the run's id from TXCORE_RUN.

    Where `txcore launch` has set it, it names the run at the launcher's coordinator, and no other
    run that its ranks start or join by hand.

    Example:
      >>> from txcore.launch.join.cluster import run_of
      >>> launched = {"TXCORE_RUN": "3f9a", "JAX_COORDINATOR_ADDRESS": "node1:12345"}
      >>> run_of(launched, "node1:12345"), run_of(launched, "node2:12345")
      ('3f9a', None)
    """
    known = environ.get(VARIABLES[0]) or coordinator
    return environ.get(RUN_VARIABLE) or None if known == coordinator else None


def cluster(environ: Mapping[str, str] | None = None) -> Cluster | None:
    """Detect the cluster that `tx.initialize()` would join without arguments; start nothing.

    The first that is present counts: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
    (set by `txcore launch`), torchrun, Open MPI's mpirun, SLURM's srun, a TPU pod, an indexed
    Kubernetes job, and torchrun's variables MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE set by
    anything else. A shell within a SLURM job (salloc, or the batch script itself) does not count.

    Args:
      environ: the environment variables; this process's by default.

    Returns:
      The cluster, or None if this process is alone.

    Raises:
      ValueError: the variables contradict each other, are not numbers, or some are missing.

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
        count, rank = (_read_number(environ, name) for name in VARIABLES[1:])
        address = environ[VARIABLES[0]]
        return Cluster("environment", address, count, rank, run=run_of(environ, address))
    found = _find_launcher(environ)
    own = environ.get(VARIABLES[0])
    if found is not None:
        _check_agrees(environ, found)
        found = found._replace(coordinator=own) if own else found
        return found._replace(run=run_of(environ, found.coordinator) or found.run)
    if own or any(environ.get(name) for name in VARIABLES[1:]):
        raise _half_set(environ, VARIABLES, "`txcore launch` sets all three")
    return None


def _find_launcher(environ: Mapping[str, str]) -> Cluster | None:
    """Return the cluster that the variables of launchers other than `txcore launch` describe."""
    if environ.get(_TORCHRUN):  # it started this process, whatever started it (srun, mpirun)
        return _read_torchrun(environ)
    found = _read_open_mpi(environ) or _read_slurm(environ) or _leave_to_jax(environ)
    if found is None:
        return _read_torchrun(environ)
    theirs = _read_torchrun(environ) if all(environ.get(name) for name in TORCH_VARIABLES) else None
    if theirs is None or found[2:4] == theirs[2:4]:
        return found
    if found.num_processes is None:  # only jax could find it out, and here it stands
        return theirs
    raise ValueError(
        f"RANK={theirs.process_id} of WORLD_SIZE={theirs.num_processes} contradict {found.name}, "
        f"by which this is process {found.process_id} of {found.num_processes}: unset "
        f"{', '.join(TORCH_VARIABLES)}, or set all of {', '.join(VARIABLES)}"
    )


def _half_set(environ: Mapping[str, str], names: tuple[str, ...], who: str) -> ValueError:
    """Return the error for variables of which only some are set."""
    missing = [name for name in names if not environ.get(name)]
    there = [name for name in names if environ.get(name)]
    return ValueError(
        f"{', '.join(there)} say(s) that this process is one of several, which needs "
        f"{' and '.join(missing)} too ({who}): set what is missing, or unset the rest"
    )


def _check_agrees(environ: Mapping[str, str], found: Cluster) -> None:
    for name, value in zip(VARIABLES[1:], (found.num_processes, found.process_id), strict=True):
        if environ.get(name) and value not in (None, _read_number(environ, name)):
            raise ValueError(
                f"{name}={environ[name]} contradicts {found.name}, by which it is {value}: unset "
                f"it, or set all of {', '.join(VARIABLES)}"
            )


def _read_torchrun(environ: Mapping[str, str]) -> Cluster | None:
    """Read torchrun's variables (docs.pytorch.org/docs/stable/elastic/run.html), whoever set them.

    Many shells export MASTER_ADDR and MASTER_PORT, which alone do not place this process. A world
    of one needs no address.
    """
    if not any(environ.get(name) for name in ("RANK", "WORLD_SIZE")):
        return None
    if not all(environ.get(name) for name in TORCH_VARIABLES):
        if environ.get("WORLD_SIZE") == "1" and environ.get("RANK") in (None, "", "0"):
            return None
        raise _half_set(environ, TORCH_VARIABLES, "torchrun sets all four")
    rank, size, port = (
        _read_number(environ, name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")
    )
    _check_below(environ, "RANK", "WORLD_SIZE")
    _check_below(environ, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    host = environ["MASTER_ADDR"].strip("[]")
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun itself listens at MASTER_PORT: all ranks take another port, new at each start.
        names = (_TORCHRUN, "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
        start = " ".join(environ.get(name, "") for name in names)
        port = _choose_port(environ, zlib.crc32(start.encode()))
        if environ.get("LOCAL_WORLD_SIZE") == environ["WORLD_SIZE"]:
            host = "127.0.0.1"
    elif not 0 < port < 2**16:
        raise ValueError(
            f"launch.cluster needs MASTER_PORT= a number from 1 to {2**16 - 1}, got {port}"
        )
    devices = _torch_devices(environ, size)
    run = None
    if environ.get(_TORCHRUN):  # "none" by default; but each run's store has a port of its own
        run = f"torchrun {environ[_TORCHRUN]} {environ['MASTER_PORT']}"
    return Cluster("torchrun", addresses.join_address(host, port), size, rank, devices, run)


def _torch_devices(environ: Mapping[str, str], size: int) -> tuple[int, ...] | None:
    """Return the GPUs that torchrun's variables give to a process: usually that of LOCAL_RANK."""
    if not environ.get("LOCAL_RANK") or size == 1:
        return None
    local_rank = _read_number(environ, "LOCAL_RANK")
    if environ.get("LOCAL_WORLD_SIZE"):
        return local_devices(environ, local_rank, _read_number(environ, "LOCAL_WORLD_SIZE"))
    return local_devices(environ, local_rank, local_rank + 1) and (local_rank,)


def _check_below(environ: Mapping[str, str], name: str, of: str) -> None:
    """Refuse a rank that is not below its count, if both are set."""
    if not (environ.get(name) and environ.get(of)):
        return
    rank, count = _read_number(environ, name), _read_number(environ, of)
    if rank >= count:
        raise ValueError(
            f"{name}={rank} contradicts {of}={count}, which needs it from 0 to {count - 1}: set "
            "both as torchrun does"
        )


def _read_open_mpi(environ: Mapping[str, str]) -> Cluster | None:
    if "OMPI_COMM_WORLD_RANK" not in environ or "OMPI_COMM_WORLD_SIZE" not in environ:
        return None
    size, rank = (_read_number(environ, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK"))
    local_size = int(environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", size))
    local_rank = int(environ.get("OMPI_COMM_WORLD_LOCAL_RANK", rank))
    host: str | None = "127.0.0.1"
    if local_size < size:
        # mpirun's own addresses, before Open MPI 5; it starts rank 0 where it runs itself.
        uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
        found = re.search(r"tcp://([^,:]+)|tcp6://(\[[^],]+)", uri)
        host = (found[1] or found[2] + "]") if found else None
    job = environ.get("PMIX_NAMESPACE", "")
    port = _choose_port(environ, zlib.crc32(job.encode()))
    devices = local_devices(environ, local_rank, local_size)
    address = f"{host}:{port}" if host else None
    return Cluster("Open MPI", address, size, rank, devices, f"mpirun {job}" if job else None)


def _read_slurm(environ: Mapping[str, str]) -> Cluster | None:
    needed = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID")
    if any(name not in environ for name in (*needed, "SLURM_STEP_NUM_TASKS")):
        return None
    job, step = (_read_number(environ, name) for name in needed[:2])
    if step >= _FIRST_SPECIAL_STEP:
        return None
    tasks = tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    host = "127.0.0.1" if len(tasks) == 1 else first_host(environ["SLURM_STEP_NODELIST"])
    node = int(environ.get("SLURM_NODEID", "0"))
    here = tasks[node] if node < len(tasks) else 1
    return Cluster(
        "SLURM",
        # Steps of one job may run side by side.
        f"{host}:{_choose_port(environ, job + 1009 * step)}",
        _read_number(environ, "SLURM_STEP_NUM_TASKS"),
        _read_number(environ, "SLURM_PROCID"),
        local_devices(environ, int(environ.get("SLURM_LOCALID", "0")), here),
        f"SLURM {job}.{step} {environ.get('SLURM_RESTART_COUNT', '0')}",
    )


def _leave_to_jax(environ: Mapping[str, str]) -> Cluster | None:
    """Return a cluster whose details jax has to find out over the network."""
    if _compat.on_tpu_vm() and "TPU_SKIP_MDS_QUERY" not in environ:
        return Cluster("TPU pod")
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return Cluster("Kubernetes")
    return None


def local_devices(
    environ: Mapping[str, str], local_rank: int, local_size: int
) -> tuple[int, ...] | None:
    """Return the visible GPUs that a process takes; None for all.

    It takes all if it is the only process of its host or has GPUs of its own (`--gpus-per-task`).
    If all processes of the host see the same N GPUs, it takes an equal share of them; if N is not
    known, it takes one.

    Args:
      environ: the environment variables.
      local_rank: the number of this process on its host, from 0.
      local_size: the number of processes on its host.

    Example:
      >>> from txcore.launch.join.cluster import local_devices
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
      >>> from txcore.launch.join.cluster import first_host
      >>> first_host("gpu[007-012,020],login1")
      'gpu007'
    """
    name = re.match(r"(?:\[[^]]*\]|[^],\[])*", nodes)
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", name[0] if name else nodes)


def tasks_per_node(text: str) -> list[int]:
    """Return the number of tasks on each node, as SLURM writes it.

    Example:
      >>> from txcore.launch.join.cluster import tasks_per_node
      >>> tasks_per_node("4(x2),3")
      [4, 4, 3]
    """
    pairs = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return list(itertools.chain(*([int(tasks)] * int(times or 1) for tasks, times in pairs)))


def _choose_port(environ: Mapping[str, str], job: int) -> int:
    """Return the coordinator's port: the given one, or one derived from the job's number."""
    if environ.get("JAX_COORDINATOR_PORT"):
        return _read_number(environ, "JAX_COORDINATOR_PORT")
    return _FIRST_PORT + job % _PORTS


def _read_number(environ: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"\d+", environ[name]):
        raise ValueError(f"launch.cluster needs {name}= a number from 0 on, got {environ[name]!r}")
    return int(environ[name])
