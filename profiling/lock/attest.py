"""Hold a program that is about to run to the one that its lock file has."""

import logging
import os
import pathlib

import jax

from txcore.errors import TxcoreError
from txcore.profiling.lock.check import update
from txcore.profiling.lock.diff import compare, write_changes
from txcore.profiling.lock.file import read_locks
from txcore.profiling.lock.model import Lock, LockError, lock_of, target_of
from txcore.profiling.lock.proof import Proof, list_differences
from txcore.profiling.report import Report

_log = logging.getLogger("txcore.profiling.lock")
LOCK_VARIABLE = "TXCORE_LOCK"  # the lock file of a run: `txcore launch --lock FILE`
NOTE_VARIABLE = "TXCORE_LOCK_NOTES"  # a folder in which each rank that was held to it leaves a note
UPDATE_VARIABLE = "TXCORE_LOCK_UPDATE"  # "1": runs write down what they are, and are not held to it


class AttestationError(TxcoreError, RuntimeError):
    """A program that is about to run is not the one that was locked; the text says what differs."""


def attest(path: str | os.PathLike[str], report: Report, proof: Proof, *, write: bool) -> str:
    """Hold a program to its lock file, or write it there.

    Args:
      path: the lock file.
      report: the program's audit.
      proof: what the program is.
      write: whether to lock the program; of several processes the first one writes.

    Returns:
      The line that names the proof, for logs and checkpoints; it is logged.

    Raises:
      AttestationError: the program is another one than was locked.
      LockError: the file cannot be read or written.
    """
    if write:
        if jax.process_index() == 0:
            outcome = update(path, report, proof=proof)
            if not outcome.ok:
                raise AttestationError(f"{proof.name} cannot be locked: {outcome.text}")
        line = f"{proof.name} was locked in {path}: {target_of(report)}, {proof.line}"
    else:
        differences = list_attested_differences(read_locks(path), report, proof)
        if differences:
            raise AttestationError(describe_refusal(path, proof.name, differences))
        line = f"{proof.name} is the program of {path}: {target_of(report)}, {proof.line}"
    _log.info(line)
    if (notes := os.environ.get(NOTE_VARIABLE)) and os.path.isdir(notes):
        pathlib.Path(notes, str(jax.process_index())).write_text(f"{line}\n", encoding="utf-8")
    return line


def list_attested_differences(
    locks: dict[str, Lock], report: Report, proof: Proof
) -> tuple[str, ...]:
    """List in words what differs between a program and the locked one; () where it is the same."""
    target = target_of(report)
    if target not in locks:
        has = ", ".join(sorted(locks)) or "none"
        return (f"it is for {target or 'no device'}, and the file has {has}",)
    locked = locks[target]
    same = [one for one in locked.proofs if one.versions == proof.versions]
    nearest = same or locked.proofs[-1:]
    if not nearest:
        return ("the file has what it sends, but not what it is: lock it with --attest",)
    found = _list_sent(locked, report)
    return (*found, *list_differences(nearest[0], proof))


def _list_sent(locked: Lock, report: Report) -> list[str]:
    report = report.allowing(locked.allow)
    if not report.ok:
        return [report.verdict()]
    try:
        return write_changes(compare(locked, lock_of(report)))
    except LockError as error:  # there is no traced program to compare with
        return [str(error)]


def describe_refusal(path: str | os.PathLike[str], name: str, differences: tuple[str, ...]) -> str:
    """Write the error of a program that is not the locked one."""
    return "\n".join(
        [
            f"a run that is held to {path} needs its locked program, but {name} is another:",
            *(f"  {line}" for line in differences),
            "run the locked one, or review what differs and lock it anew: txcore launch --lock "
            f"{path} --update-lock, or tx.attested({str(path)!r}, update=True)",
        ]
    )


def is_updating() -> bool:
    """Tell whether this run locks its programs (`txcore launch --update-lock`)."""
    return os.environ.get(UPDATE_VARIABLE) == "1"
