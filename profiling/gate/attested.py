"""A block in which the program that communicates has to be the locked one."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from txcore.profiling.gate.hooks import watch_in_block
from txcore.profiling.gate.watches import Compilation, watches_of_thread
from txcore.profiling.lock.attest import (
    LOCK_VARIABLE,
    AttestationError,
    attest,
    describe_refusal,
    is_updating,
    list_attested_differences,
)
from txcore.profiling.lock.file import read_locks
from txcore.profiling.lock.proof import make_proof
from txcore.profiling.report import Collective


@contextlib.contextmanager
def attested(*files: str | os.PathLike[str], update: bool = False) -> Iterator[None]:
    """Run only programs that are locked: what is about to run has to be what was proved.

    Each program that this thread compiles in the block, and that communicates or has the name of a
    locked one, is compared with the lock files before it runs: what it sends, its compiler
    options and flags, jax's version, and a fingerprint of its optimized module without what may
    change. Programs that were compiled before are compiled anew, once for each content of the
    files. A `jax.stages.Compiled` that was made before is not seen.

    Args:
      *files: lock files that `txcore lock update --attest` or `update` has written. A program has
        to be that of one of them. None takes that of `txcore launch --lock FILE`.
      update: lock the program in the block in place of holding it to the file (one file, one
        program). So does the environment variable TXCORE_LOCK_UPDATE=1.

    Raises:
      AttestationError: from the call that compiles it: a program is not the locked one, on this or
        any rank where it is not; or, at the end of the block, no program was.
      LockError: a file cannot be read.
      TypeError: no file, or several with `update`.

    Example:
      >>> import tempfile
      >>> from txcore.profiling.gate.attested import attested
      >>> mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> total = jax.jit(jax.shard_map(
      ...     lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P()))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with attested(f"{folder}/total.lock.json", update=True):
      ...         print(total(np.ones(2, np.float32)))
      ...     with attested(f"{folder}/total.lock.json"):
      ...         print(total(np.ones(2, np.float32)))
      [2.]
      [2.]
    """
    update = update or is_updating()
    if not files and LOCK_VARIABLE in os.environ:
        files = (os.environ[LOCK_VARIABLE],)
    if not files or (update and len(files) > 1):
        raise TypeError(
            f"attested needs {'one lock file' if update else 'lock files'}, but got {len(files)}: "
            "write attested('step.lock.json')"
        )
    paths = tuple(os.fspath(file) for file in files)
    watch = _Attestation(paths, tuple(map(_digest, paths)), update)
    with watch_in_block(*(w for w in watches_of_thread() if w != watch), watch):
        yield
    if watch not in _found:
        done = "locked" if update else f"that of {' or '.join(paths)}"
        raise AttestationError(
            f"attested needs a program in its block that is {done}, but none was: call the "
            "function itself in the block, and not one that was compiled before"
        )


_found: "dict[_Attestation, str]" = {}  # the newest line of each that has seen its program


@dataclass(frozen=True)
class _Attestation:
    """The watch of such a block."""

    paths: tuple[str, ...]
    contents: tuple[str, ...]
    update: bool

    def see_program(self, program: Compilation) -> None:
        """Raise where a program has to be the locked one, and is not."""
        proof = make_proof(program.name, program.text, program.options)
        if self.update:
            if program.report.collectives:
                if self in _found and proof.line not in _found[self]:
                    raise AttestationError(
                        "a lock file keeps one program, but the block has another that "
                        f"communicates, {program.name}: {_found[self]}; give each its block"
                    )
                _found[self] = attest(self.paths[0], program.report, proof, write=True)
            return
        told = {}
        for path in self.paths:
            locks = read_locks(path)
            found = list_attested_differences(locks, program.report, proof)
            if not found:
                _found[self] = attest(path, program.report, proof, write=False)
                return
            names = {one.name for lock in locks.values() for one in lock.proofs}
            told[path] = (proof.name not in names, len(found), found)
        path = min(told, key=lambda one: told[one][:2])
        is_stranger, _, differences = told[path]
        if program.report.collectives or not is_stranger:
            raise AttestationError(describe_refusal(path, program.name, differences))

    def see_move(self, row: Callable[[], Collective | None]) -> None:
        """Let arrays be placed: no program does that."""


def _digest(path: str) -> str:
    """Return a digest of a file, "" where it is not there: part of jax's key for its programs."""
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError:
        return ""
