"""A training step that is about to run, held to the lock file of its run."""

import os

from txcore.train.options import Options
from txcore.train.steps.compile import CompiledStep

LOCK_VARIABLE = "TXCORE_LOCK"  # as in txcore.profiling.lock.attest, which not every run imports


def hold_to_lock(options: Options, compiled: CompiledStep, *, many: bool) -> str:
    """Compare a step with the lock of its engine or run, or lock it there; see `tx.attested`.

    Args:
      options: the engine's.
      compiled: the step.
      many: whether it is several steps in one program.

    Returns:
      The line that names the proof; "" where nothing is to be held to.

    Raises:
      AttestationError: it is not the locked program.
      ValueError: several steps are one program.
    """
    path = options.lock or os.environ.get(LOCK_VARIABLE)
    if not path:
        return ""
    if many:
        raise ValueError(
            f"a run that is held to {path} needs its one locked step, got several steps in one "
            "program: give steps_per_call=1 (run in the place of run_many), or leave the lock out"
        )
    # Not needed to train: see compile.py.
    from txcore.profiling.audit import audit_program
    from txcore.profiling.lock.attest import attest, is_updating
    from txcore.profiling.lock.proof import proof_of

    report, proof = audit_program(compiled.program), proof_of(compiled.program)
    return attest(path, report, proof, write=is_updating())
