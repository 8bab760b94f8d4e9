"""A real SLURM in a folder of its own: one node with every socket on loopback, or several hosts."""

import contextlib
import os
import pathlib
import random
import socket
import subprocess
import time

from processes import free_port

CONFIGURATION = """\
ClusterName=m
SlurmctldHost={control}
FirstJobId={first_job}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={port}
SlurmdPort={slurmd_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
LaunchParameters=use_interactive_step
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
ReturnToService=2
MailProg=/bin/true
KillWait=10
{nodes}
PartitionName=main Nodes=ALL Default=YES
"""


class Slurm:
    """Commands of a SLURM that runs.

    Args:
      folder: where it keeps everything.
      nodes: name and address of each.
      on: makes a command run on the node of a number.
    """

    def __init__(self, folder, nodes, on):
        self.folder, self.nodes, self._on = pathlib.Path(folder), nodes, on
        own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "XLA_FLAGS"))}
        path = own.get("PATH", "") + ":/usr/sbin"
        own |= {"SLURM_CONF": str(self.folder / "slurm.conf"), "JAX_PLATFORMS": "cpu", "PATH": path}
        self.environment = own

    def configure(self):
        """Write the configuration and make the folders."""
        port, slurmd_port = free_port(), free_port()
        (self.folder / "state").mkdir(parents=True)
        for name, _ in self.nodes:
            (self.folder / f"spool.{name}").mkdir()
        lines = [f"NodeName={name} NodeAddr={address} CPUs=8" for name, address in self.nodes]
        text = CONFIGURATION.format(
            folder=self.folder,
            control="{}({})".format(*self.nodes[0]),
            nodes="\n".join(lines),
            port=port,
            slurmd_port=slurmd_port,
            first_job=random.randint(1, 60000),  # whose coordinators' ports are of their own
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def start(self, number, *command):
        """Start a daemon on a node."""
        return subprocess.Popen(
            self._on(number, *command),
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def run(self, *command, timeout=120, cwd=None, check=True, **environment):
        """Run a command on the first node and return what came out."""
        done = subprocess.run(
            self._on(0, *(str(word) for word in command)),
            env=self.environment | environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def log(self):
        """Return the end of what the daemons wrote."""
        return "\n".join(path.read_text()[-2000:] for path in sorted(self.folder.glob("*.log")))

    def wait_until_idle(self, deadline):
        """Wait until all nodes take jobs."""
        while self.run("sinfo", "-h", "-N", "-o", "%T", check=False).stdout.split() != [
            "idle"
        ] * len(self.nodes):
            assert time.monotonic() < deadline, f"SLURM did not start:\n{self.log()}"
            time.sleep(0.1)

    def job(self, number):
        """Return what SLURM knows of a job, as data."""
        text = self.run("scontrol", "show", "job", "-o", number).stdout
        return dict(word.partition("=")[::2] for word in text.split())


@contextlib.contextmanager
def started(folder, nodes=None, on=lambda _, *command: list(command)):
    """Run SLURM's daemons, slurmctld on the first node, until the end of the block."""
    host = socket.gethostname().partition(".")[0]
    slurm = Slurm(folder, nodes or [(host, "127.0.0.1")], on)
    slurm.configure()
    daemons = []
    try:
        # In the foreground, so that their ids are known.
        daemons.append(slurm.start(0, "slurmctld", "-D", "-c"))
        for number, (name, _) in enumerate(slurm.nodes):
            daemons.append(slurm.start(number, "slurmd", "-D", "-N", name))
        slurm.wait_until_idle(time.monotonic() + 120)
        yield slurm
    finally:
        with contextlib.suppress(Exception):  # so that no step is left behind
            slurm.run("scancel", "--user=root", timeout=10)
            time.sleep(0.5)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
