"""What is read from the environment of SLURM, Open MPI, Kubernetes and TPU pods."""

import re
import zlib

import pytest

from txcore import _compat
from txcore.launch import Cluster, cluster
from txcore.launch.join.cluster import first_host, local_devices, run_of, tasks_per_node

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
JOB, MPI = "SLURM 7.0 0", "mpirun 823656449"  # the runs of these
HOSTS = MPIRUN | {"OMPI_COMM_WORLD_SIZE": "4"}
LAUNCH = {
    "JAX_COORDINATOR_ADDRESS": "127.0.0.1:12345",
    "JAX_NUM_PROCESSES": "3",
    "JAX_PROCESS_ID": "2",
}
# As torchrun --nnodes 2 --nproc-per-node 2 sets them for the first process of the second node.
TORCHRUN = {
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "RANK": "2",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "ROLE_RANK": "2",
    "ROLE_WORLD_SIZE": "4",
    "ROLE_NAME": "default",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_MAX_RESTARTS": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
ONE_HOST = TORCHRUN | {"LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "2"}
# What a launcher, a manifest or a person that speaks torchrun's words sets.
TORCH = {name: TORCHRUN[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")}


def torchruns_port(text):
    """The port of a run id, MASTER_PORT and restart, by zlib's crc32 as the documents say."""
    return 61440 + zlib.crc32(text.encode()) % 4096


@pytest.mark.parametrize(
    "environ, host, text, devices",
    [
        (TORCHRUN, "node1", "none 29500 0", (0,)),
        (ONE_HOST, "127.0.0.1", "none 29500 0", (2,)),
        (ONE_HOST | {"TORCHELASTIC_RESTART_COUNT": "1"}, "127.0.0.1", "none 29500 1", (2,)),
        (ONE_HOST | {"MASTER_PORT": "29501"}, "127.0.0.1", "none 29501 0", (2,)),
        (TORCHRUN | {"MASTER_ADDR": "fe80::1"}, "[fe80::1]", "none 29500 0", (0,)),
        (TORCHRUN | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, "node1", "none 29500 0", (0, 1)),
        # srun or mpirun starts torchrun, once a node: torchrun's word is of this process
        (TORCHRUN | SRUN, "node1", "none 29500 0", (0,)),
        (TORCHRUN | MPIRUN, "node1", "none 29500 0", (0,)),
    ],
)
def test_torchrun(environ, host, text, devices):
    coordinator = f"{host}:{torchruns_port(text)}"
    run = f"torchrun {text.rpartition(' ')[0]}"  # each agent counts restarts of its own
    assert cluster(environ) == Cluster("torchrun", coordinator, 4, 2, devices, run)


def test_torchruns_port_of_the_documents():
    assert cluster(TORCHRUN).coordinator == f"node1:{torchruns_port('none 29500 0')}"
    assert cluster(TORCHRUN | {"JAX_COORDINATOR_PORT": "5555"}).coordinator == "node1:5555"
    assert cluster(TORCHRUN | {"JAX_COORDINATOR_ADDRESS": "a:1"}).coordinator == "a:1"
    assert cluster(TORCHRUN | LAUNCH).name == "environment"


@pytest.mark.parametrize(
    "more, devices",
    [
        ({}, None),
        ({"LOCAL_RANK": "1"}, (1,)),
        ({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,5,6"}, (1,)),
        ({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "5"}, None),  # its own
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (1,)),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # Kubeflow's training operator
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}, None),
        ({"TORCHELASTIC_RUN_ID": "7", "TORCHELASTIC_USE_AGENT_STORE": "False"}, None),
    ],
)
def test_torchruns_variables_by_others(more, devices):
    """Nobody listens at MASTER_PORT: process 0 can."""
    run = "torchrun 7 29500" if "TORCHELASTIC_RUN_ID" in more else None
    assert cluster(TORCH | more) == Cluster("torchrun", "node1:29500", 4, 2, devices, run)


@pytest.mark.parametrize(
    "environ",
    [
        {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
        {"LOCAL_RANK": "0"},
        {"RANK": "", "WORLD_SIZE": ""},
    ],
)
def test_torchruns_variables_that_leave_a_process_alone(environ):
    assert cluster(environ) is None


@pytest.mark.parametrize(
    "environ, there, missing",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE", "MASTER_ADDR and MASTER_PORT and RANK"),
        ({"RANK": "0"}, "RANK", "MASTER_ADDR and MASTER_PORT and WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK, WORLD_SIZE", "MASTER_ADDR and MASTER_PORT"),
        ({k: v for k, v in TORCH.items() if k != "RANK"}, "MASTER_ADDR, MASTER_PORT, WORLD_SIZE",
         "RANK"),
        (TORCHRUN | {"MASTER_PORT": ""}, "MASTER_ADDR, RANK, WORLD_SIZE", "MASTER_PORT"),
    ],
)  # fmt: skip
def test_a_part_of_torchruns_variables(environ, there, missing):
    text = (
        f"{there} say(s) that this process is one of several, which needs {missing} too (torchrun "
        "sets all four): set what is missing, or unset the rest"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        cluster(environ)


@pytest.mark.parametrize("other", [SRUN, MPIRUN])
def test_torchruns_variables_beside_another_launcher(other):
    """Left over from a pod or a shell, they would make N lone trainings of one with N ranks."""
    name = cluster(other).name
    agrees = TORCH | {"RANK": "1", "WORLD_SIZE": "2"}
    assert cluster(other | agrees) == cluster(other)
    assert cluster(other | {"RANK": "0", "WORLD_SIZE": "1"}) == cluster(other)  # no address
    stale = TORCH | {"RANK": "0", "WORLD_SIZE": "1"}
    text = (
        f"RANK=0 of WORLD_SIZE=1 contradict {name}, by which this is process 1 of 2: unset "
        "MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE, or set all of JAX_COORDINATOR_ADDRESS, "
        "JAX_NUM_PROCESSES, JAX_PROCESS_ID"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        cluster(other | stale)
    assert cluster(other | stale | LAUNCH).name == "environment"


@pytest.mark.parametrize(
    "more, text",
    [
        ({"RANK": "4"}, "RANK=4 contradicts WORLD_SIZE=4, which needs it from 0 to 3"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 contradicts LOCAL_WORLD_SIZE=2, which needs it from"),
        ({"RANK": "one"}, "launch.cluster needs RANK= a number from 0 on, got 'one'"),
        ({"RANK": "-1"}, "launch.cluster needs RANK= a number from 0 on, got '-1'"),
        (
            {"MASTER_PORT": "http"},
            "launch.cluster needs MASTER_PORT= a number from 0 on, got 'http'",
        ),
        ({"JAX_NUM_PROCESSES": "8"}, "JAX_NUM_PROCESSES=8 contradicts torchrun, by which it is 4"),
        (
            {"MASTER_PORT": "65536", "TORCHELASTIC_USE_AGENT_STORE": "False"},
            "launch.cluster needs MASTER_PORT= a number from 1 to 65535, got 65536",
        ),
    ],
)
def test_torchruns_variables_that_contradict_each_other(more, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        cluster(TORCHRUN | more)


@pytest.mark.parametrize(
    "environ, found",
    [
        ({}, None),
        (LAUNCH, Cluster("environment", "127.0.0.1:12345", 3, 2)),
        (SRUN, Cluster("SLURM", "127.0.0.1:61447", 2, 1, (1,), JOB)),
        (NODES, Cluster("SLURM", "gpu07:61447", 6, 3, (0,), JOB)),
        (
            NODES | {"SLURM_STEP_ID": "2"},
            Cluster("SLURM", "gpu07:63465", 6, 3, (0,), "SLURM 7.2 0"),
        ),
        (
            SRUN | {"SLURM_JOB_ID": "4103"},
            Cluster("SLURM", "127.0.0.1:61447", 2, 1, (1,), "SLURM 4103.0 0"),
        ),
        (
            SRUN | {"JAX_COORDINATOR_PORT": "5555"},
            Cluster("SLURM", "127.0.0.1:5555", 2, 1, (1,), JOB),
        ),
        (SRUN | {"JAX_COORDINATOR_ADDRESS": "a:1"}, Cluster("SLURM", "a:1", 2, 1, (1,), JOB)),
        (MPIRUN, Cluster("Open MPI", "127.0.0.1:65315", 2, 1, (1,), MPI)),
        (HOSTS, Cluster("Open MPI", "192.0.2.7:65315", 4, 1, (1,), MPI)),
        (MPIRUN | SRUN, Cluster("Open MPI", "127.0.0.1:65315", 2, 1, (1,), MPI)),
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
    assert found == Cluster("Open MPI", coordinator, 4, 1, (1,), MPI)


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
    text = f"launch.cluster needs {name}= a number from 0 on, got {value!r}"
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


@pytest.mark.parametrize("environ", [LAUNCH, SRUN, MPIRUN, TORCHRUN, TORCH])
def test_the_run_that_a_person_or_the_launcher_names(environ):
    named = environ | {"TXCORE_RUN": "mine"}
    assert cluster(named).run == "mine"
    # The launcher's own coordinator is another one where a rank of its joins another run by hand.
    launched = {"TXCORE_RUN": "mine", "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1"}
    assert run_of(launched, cluster(environ).coordinator) is None
    assert run_of(launched, "10.0.0.1:1") == "mine"
    assert run_of({"TXCORE_RUN": ""}, "10.0.0.1:1") is None


def test_an_attempt_that_slurm_starts_again_is_another_run():
    assert cluster(SRUN | {"SLURM_RESTART_COUNT": "2"}).run == "SLURM 7.0 2"
