"""What is read from the environment of SLURM, Open MPI, Kubernetes and TPU pods."""

import re

import pytest

from txcore import _compat
from txcore.launch import Cluster, cluster
from txcore.launch.cluster import first_host, local_devices, tasks_per_node

# As srun -n 2 and mpirun -n 2 set them on one host.
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "vm",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
}
# 3 tasks on each of 2 nodes; this is the first one of the second.
NODES = SRUN | {
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "823656448.0;tcp://192.0.2.7,10.1.1.1:56933",
    "PMIX_NAMESPACE": "823656449",
}
HOSTS = MPIRUN | {"OMPI_COMM_WORLD_SIZE": "4"}
LAUNCH = {
    "JAX_COORDINATOR_ADDRESS": "127.0.0.1:12345",
    "JAX_NUM_PROCESSES": "3",
    "JAX_PROCESS_ID": "2",
}


@pytest.mark.parametrize(
    "environ, found",
    [
        ({}, None),
        (LAUNCH, Cluster("environment", "127.0.0.1:12345", 3, 2)),
        (SRUN, Cluster("SLURM", "127.0.0.1:61447", 2, 1, (1,))),
        (NODES, Cluster("SLURM", "gpu07:61447", 6, 3, (0,))),
        (NODES | {"SLURM_STEP_ID": "2"}, Cluster("SLURM", "gpu07:63465", 6, 3, (0,))),
        (SRUN | {"SLURM_JOB_ID": "4103"}, Cluster("SLURM", "127.0.0.1:61447", 2, 1, (1,))),
        (SRUN | {"JAX_COORDINATOR_PORT": "5555"}, Cluster("SLURM", "127.0.0.1:5555", 2, 1, (1,))),
        (SRUN | {"JAX_COORDINATOR_ADDRESS": "a:1"}, Cluster("SLURM", "a:1", 2, 1, (1,))),
        (MPIRUN, Cluster("Open MPI", "127.0.0.1:65315", 2, 1, (1,))),
        (HOSTS, Cluster("Open MPI", "192.0.2.7:65315", 4, 1, (1,))),
        (MPIRUN | SRUN, Cluster("Open MPI", "127.0.0.1:65315", 2, 1, (1,))),
        (MPIRUN | SRUN | LAUNCH, Cluster("environment", "127.0.0.1:12345", 3, 2)),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
            Cluster("Kubernetes"),
        ),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
def test_found(environ, found):
    assert cluster(environ) == found


@pytest.mark.parametrize(
    "environ",
    [
        # salloc's shell, the batch script, and salloc's shell within an interactive step
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_NODELIST": "vm"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        SRUN | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        SRUN | {"SLURM_STEP_ID": "4294967291"},
    ],
)
def test_a_shell_in_a_slurm_job_is_no_process_of_a_run(environ):
    assert cluster(environ) is None


def test_the_own_environment_is_read_by_default(monkeypatch):
    for name, value in LAUNCH.items():
        monkeypatch.setenv(name, value)
    assert cluster() == Cluster("environment", "127.0.0.1:12345", 3, 2)


@pytest.mark.parametrize("found", [True, False])
def test_tpu_pod(found, monkeypatch):
    monkeypatch.setattr(_compat, "on_tpu_vm", lambda: found)
    assert cluster({}) == (Cluster("TPU pod") if found else None)
    assert cluster({"TPU_SKIP_MDS_QUERY": "1"}) is None


@pytest.mark.parametrize(
    "uri, coordinator",
    [
        ("1.0;tcp6://[fe80::b9b,2620::2]:43370", "[fe80::b9b]:65315"),
        ("1.0;tcp://192.0.2.7:1", "192.0.2.7:65315"),
        ("", None),  # Open MPI 5 does not say
    ],
)
def test_open_mpi_on_several_hosts(uri, coordinator):
    found = cluster(HOSTS | {"OMPI_MCA_orte_hnp_uri": uri})
    assert found == Cluster("Open MPI", coordinator, 4, 1, (1,))


@pytest.mark.parametrize(
    "there, missing",
    [
        (["JAX_COORDINATOR_ADDRESS"], "JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        (["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"], "JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_a_part_of_the_variables(there, missing):
    text = (
        f"{', '.join(there)} say(s) that this process is one of several, which needs {missing} too "
        "(`txcore launch` sets all three): set what is missing, or unset the rest"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        cluster({name: LAUNCH[name] for name in there})


@pytest.mark.parametrize(
    "name, found",
    [("JAX_NUM_PROCESSES", SRUN["SLURM_STEP_NUM_TASKS"]), ("JAX_PROCESS_ID", SRUN["SLURM_PROCID"])],
)
def test_a_variable_that_contradicts_the_cluster(name, found):
    assert cluster(SRUN | {name: found}) == cluster(SRUN)
    text = (
        f"{name}=99 contradicts SLURM, by which it is {found}: unset it, or set all of "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        cluster(SRUN | {name: "99"})


@pytest.mark.parametrize(
    "name, value, environ",
    [
        ("JAX_PROCESS_ID", "one", LAUNCH),
        ("JAX_NUM_PROCESSES", "-1", LAUNCH),
        ("SLURM_PROCID", "1.0", SRUN),
        ("OMPI_COMM_WORLD_SIZE", " 2", MPIRUN),
        ("JAX_COORDINATOR_PORT", "http", SRUN),
    ],
)
def test_no_number(name, value, environ):
    text = f"{name} must be a number from 0 on, got {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        cluster(environ | {name: value})


@pytest.mark.parametrize(
    "environ, rank, size, own",
    [
        ({}, 0, 1, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 0, 1, None),
        ({}, 1, 2, (1,)),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 1, 2, (1,)),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7,8"}, 1, 2, (2, 3)),
        ({"ROCR_VISIBLE_DEVICES": "0,1,2,3"}, 0, 2, (0, 1)),
        # --gpus-per-task: each task sees its own
        ({"CUDA_VISIBLE_DEVICES": "3", "SLURM_GPUS_PER_TASK": "1"}, 1, 2, None),
        ({"CUDA_VISIBLE_DEVICES": "2,3", "SLURM_GPUS_PER_TASK": "2"}, 1, 2, None),
        ({"CUDA_VISIBLE_DEVICES": "2,3", "SLURM_GPUS_PER_TASK": "h100:2"}, 1, 2, None),
        # the same with --gpu-bind=none: each sees all
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_PER_TASK": "2"}, 1, 2, (2, 3)),
        ({"CUDA_VISIBLE_DEVICES": "1"}, 1, 2, None),
        ({"JAX_LOCAL_DEVICE_IDS": "0"}, 1, 2, None),
    ],
)
def test_gpus_of_a_process(environ, rank, size, own):
    assert local_devices(environ, rank, size) == own


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("vm", "vm"),
        ("node001,host2", "node001"),
        ("node[001-015],host2", "node001"),
        ("node[001,007-015],host2", "node001"),
        ("n[7]-ib,n[8]", "n7-ib"),
        ("r[1-2]n[3,5],x", "r1n3"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize("text, counts", [("2", [2]), ("2(x3),1", [2, 2, 2, 1]), ("1,3", [1, 3])])
def test_tasks_per_node(text, counts):
    assert tasks_per_node(text) == counts
