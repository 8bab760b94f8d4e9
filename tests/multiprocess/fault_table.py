"""A run of two ranks of which one alone has a limit or a fault: seconds, and what each rank says.

    python tests/multiprocess/fault_table.py FOLDER [FAULT ...]

Mounting needs root: the full disk, and the folder that is not shared.
"""

import pathlib
import re
import subprocess
import sys
import time

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import runs
from processes import free_port, rank_environment

WORLD, ODD = 2, 1
ARGS = ("--steps", "60", "--every", "20", "--pause", "0.01")
MOST_S = 300
SAID = re.compile(r"^(WARNING:txcore:)?txcore: |Error: |^ +[-+][A-Za-z_]| differs from ")


def limit(text):
    """Return the start of a command that runs under a limit of the shell."""
    return ["bash", "-c", f'ulimit {text}; exec "$@"', "limited"]


def elsewhere(folder):
    """Return the start of a command that has a file system of its own in the checkpoints' place."""
    mount = f"mkdir -p {folder}/saved && mount -t tmpfs tmpfs {folder}/saved"
    return ["unshare", "-m", "bash", "-c", f'{mount} && exec "$@"', "elsewhere"]


# What the odd rank has otherwise: the start of its command, variables, the end of its command.
FAULTS = {
    "none": ([], {}, ()),
    "disk": ([], {}, ()),
    "open files": (limit("-n 20"), {}, ()),
    "file size": (limit("-f 50"), {}, ()),
    "memory": (limit("-v 1700000"), {}, ()),
    "folder": (elsewhere, {}, ()),
    "compiler flags": ([], {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"}, ()),
    "jax setting": ([], {"JAX_DEFAULT_MATMUL_PRECISION": "bfloat16"}, ()),
    "--steps": ([], {}, ("--steps", "80")),
    "--every": ([], {}, ("--every", "10")),
    "data": ([], {}, ("--odd", "batch")),
    "seed": ([], {}, ("--odd", "seed")),
    "version": ([], {}, ("--odd", "version")),
    "clock": ([], {}, ("--odd", "clock")),
}


def start(folder, fault):
    """Start all ranks, the odd one with its fault; each writes its output to a file."""
    before, variables, after = FAULTS[fault]
    before = before(folder) if callable(before) else before
    environment = rank_environment(JAX_NUM_CPU_DEVICES="1", JAX_NUM_PROCESSES=str(WORLD))
    environment["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{free_port()}"
    ranks = []
    for rank in range(WORLD):
        command = [sys.executable, str(runs.SCRIPT), str(folder), *ARGS]
        own = environment | {"JAX_PROCESS_ID": str(rank)}
        if rank == ODD:
            command, own = [*before, *command, *after], own | variables
        with open(folder / f"out.{rank}", "wb") as file:
            ranks.append(subprocess.Popen(command, stdout=file, stderr=file, env=own))
    return ranks


def show(folder, fault):
    """Run with a fault, and print the seconds to the end, the exit codes, and the ranks' words."""
    folder.mkdir(parents=True)
    if fault == "disk":
        (folder / "saved").mkdir()
        options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder / "saved")]
        subprocess.run(["mount", *options], check=True)
    began = time.monotonic()
    ranks = start(folder, fault)
    codes = runs.wait(ranks, MOST_S)
    print(f"{fault}: {time.monotonic() - began:.0f} s, exit codes {codes}")
    runs.stop(ranks)
    if fault == "disk":
        subprocess.run(["umount", "-l", str(folder / "saved")], check=True)
    for rank, text in enumerate(runs.said(folder, WORLD)):
        lines = [line[:200] for line in text.splitlines() if SAID.search(line)]
        for line in dict.fromkeys(lines[-4:]):
            print(f"  rank {rank}: {line}", flush=True)


if __name__ == "__main__":
    for fault in sys.argv[2:] or FAULTS:
        show(pathlib.Path(sys.argv[1]) / fault.replace(" ", "-"), fault)
