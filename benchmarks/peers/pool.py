"""Contenders: what they run, and the long-lived processes that run it."""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import IO, Any

HERE = pathlib.Path(__file__).parent
EXAMPLE = HERE.parents[1] / "examples" / "mnist"
SECONDS = 300.0  # for an answer: importing and compiling take up to a minute on a busy machine


class PeerError(RuntimeError):
    """A worker failed or did not answer."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One implementation of the step.

    Attributes:
      name: as reported.
      script: the worker, a file beside this one.
      processes: how many run it; `devices` in each.
      devices: simulated CPU devices or replicas in each process.
      precision: of the computation.
      form: which of the script's forms.
    """

    name: str
    script: str
    processes: int
    devices: int
    precision: str = "float32"
    form: str = "best"

    @property
    def own(self) -> bool:
        """Whether it runs in the project's own environment."""
        return self.script in ("txcore_worker.py", "jax_worker.py")


CONTENDERS = (
    Contender("txcore (2 devices)", "txcore_worker.py", 1, 2),
    Contender("txcore (2 processes)", "txcore_worker.py", 2, 1),
    Contender("txcore bfloat16 (2 devices)", "txcore_worker.py", 1, 2, "bfloat16"),
    Contender("txcore bfloat16 (2 processes)", "txcore_worker.py", 2, 1, "bfloat16"),
    Contender("plain jax (2 devices)", "jax_worker.py", 1, 2),
    Contender("plain jax (2 processes)", "jax_worker.py", 2, 1),
    Contender("PyTorch DDP", "torch_worker.py", 2, 1),
    Contender("PyTorch DDP (usual form)", "torch_worker.py", 2, 1, form="usual"),
    Contender("PyTorch DDP bfloat16", "torch_worker.py", 2, 1, "bfloat16"),
    Contender("TensorFlow MultiWorkerMirrored", "tensorflow_worker.py", 2, 1),
    Contender("TensorFlow Mirrored", "tensorflow_worker.py", 1, 2),
)
# Tried, slower than the same framework's form above, and measured only when asked for.
SLOWER = (
    Contender("PyTorch DDP (torch.compile)", "torch_worker.py", 2, 1, form="compiled"),
    Contender("TensorFlow MultiWorkerMirrored (XLA)", "tensorflow_worker.py", 2, 1, form="xla"),
    Contender("TensorFlow Mirrored (XLA)", "tensorflow_worker.py", 1, 2, form="xla"),
)


def worker_environment(threads: int) -> dict[str, str]:
    """Return a worker's environment variables: `threads` for what counts threads by itself."""
    return os.environ | {
        "PYTHONPATH": str(EXAMPLE),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # else a second run would compile nothing
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def free_ports(count: int) -> list[int]:
    """Return ports on which nothing listens now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def pin_command(cores: Sequence[int]) -> Iterator[None]:
    """Pin this thread, and what it starts, to `cores`."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def start_worker(
    command: Sequence[str], cores: Sequence[int], **streams: Any
) -> subprocess.Popen[str]:
    """Start a process on `cores` alone, with a thread for each; keyword arguments as Popen's."""
    # Pinned from its first instruction, since libraries size their thread pools when imported.
    with pin_command(cores):
        return subprocess.Popen(command, env=worker_environment(len(cores)), text=True, **streams)


@contextlib.contextmanager
def time_limit(processes: Sequence[subprocess.Popen[str]], seconds: float) -> Iterator[None]:
    """Kill the processes where the block takes longer, so that reading from them ends."""

    def kill() -> None:
        for process in processes:
            process.kill()

    timer = threading.Timer(seconds, kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def divide_cores(cores: Sequence[int], processes: int) -> list[Sequence[int]]:
    """Return the cores of each process: all of them, or one each."""
    return [cores] if processes == 1 else [[core] for core in cores]


class Running:
    """A contender's processes, idle between the runs.

    Raises:
      PeerError: a worker ended instead of answering, or took too long.
    """

    def __init__(
        self,
        contender: Contender,
        python: str,
        cores: Sequence[int],
        files: Sequence[str],
    ) -> None:
        self.contender = contender
        self._errors: list[IO[str]] = []
        self._answers: list[IO[str]] = []
        self._workers: list[subprocess.Popen[str]] = []
        ports = ",".join(map(str, free_ports(contender.processes)))
        options = {
            "ports": ports,
            "processes": contender.processes,
            "devices": contender.devices,
            "precision": contender.precision,
            "form": contender.form,
        }
        command = [python, str(HERE / contender.script), *files]
        command += [f"--{name}={value}" for name, value in options.items()]
        with contextlib.ExitStack() as stack:
            for rank, share in enumerate(divide_cores(cores, contender.processes)):
                errors = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
                # Not standard output, on which libraries print.
                answers, end = os.pipe()
                self._answers.append(stack.enter_context(os.fdopen(answers)))
                worker = start_worker(
                    [*command, f"--rank={rank}", f"--answers={end}"],
                    share,
                    stdin=subprocess.PIPE,
                    stdout=errors,
                    stderr=errors,
                    pass_fds=[end],
                )
                os.close(end)
                stack.enter_context(worker)
                stack.callback(worker.kill)
                self._errors.append(errors)
                self._workers.append(worker)
            self.versions = self._all_answers()[0]["versions"]
            self._stack = stack.pop_all()

    def run(self, steps: int) -> tuple[float, list[float]]:
        """Run steps; return the seconds of the slowest worker and the mean losses."""
        for worker in self._workers:
            assert worker.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # _answer says why
                worker.stdin.write(json.dumps({"steps": steps}) + "\n")
                worker.stdin.flush()
        answers = self._all_answers()
        losses = zip(*(answer["losses"] for answer in answers), strict=True)
        return max(answer["seconds"] for answer in answers), [sum(x) / len(x) for x in losses]

    def _all_answers(self) -> list[dict[str, Any]]:
        with time_limit(self._workers, SECONDS):
            return [self._answer(rank) for rank in range(len(self._workers))]

    def _answer(self, rank: int) -> dict[str, Any]:
        line = self._answers[rank].readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._errors[rank].seek(0)
        tail = self._errors[rank].read()[-2000:].strip()
        raise PeerError(
            f"{self.contender.name}: worker {rank} ended, or was ended after {SECONDS:.0f} s "
            f"without an answer; its output ends with:\n{tail}"
        )

    def close(self) -> None:
        """End the processes."""
        with contextlib.suppress(BrokenPipeError):  # what a dead worker was never told
            self._stack.close()


@contextlib.contextmanager
def launch_command(
    contenders: Sequence[Contender],
    pythons: dict[bool, str],
    cores: Sequence[int],
    files: Sequence[str],
) -> Iterator[list[Running]]:
    """Start the contenders one after the other; end all on leaving.

    Args:
      contenders: which.
      pythons: the interpreter of the project's own environment (True) and the peers' (False).
      cores: one for each worker.
      files: the flags --weights and --data.

    Returns:
      The running contenders, in the same order.
    """
    with contextlib.ExitStack() as stack:
        running = []
        for contender in contenders:
            one = Running(contender, pythons[contender.own], cores, files)
            stack.callback(one.close)
            running.append(one)
        yield running
