"""Check a program against its lock file, and update the file."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from txcore.outside import printable
from txcore.profiling.lock.diff import Change, compare, write_changes
from txcore.profiling.lock.file import format_locks, read_locks, write_file
from txcore.profiling.lock.model import Lock, LockError, lock_of, target_of
from txcore.profiling.lock.proof import Proof
from txcore.profiling.report import Report
from txcore.profiling.report.report import check_allowed


@dataclass(frozen=True)
class Outcome:
    """The result of a check or an update.

    Attributes:
      ok: whether the program may send what it sends.
      changed: whether the lock differs.
      text: the reason, for people.
    """

    ok: bool
    changed: bool
    text: str

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        from txcore.profiling.report.html.notebook import write_lines

        return write_lines(self.text)


def check(path: str | os.PathLike[str], report: Report, *, exact: bool = False) -> Outcome:
    """Compare a program with its lock file.

    Args:
      path: the lock file.
      report: of `audit`, on the target to check.
      exact: fail on entries that shrank or are gone, and on other compiler settings, too.

    Returns:
      The outcome. It is not ok where the report is not, where anything grew (an entry that the lock
      lacks, more bytes, more executions), or where an axis is over its budget. Its text says which
      XLA options and jax settings differ from those that were locked; with `exact` that fails, too.

    Raises:
      LockError: the file cannot be read, or has nothing for the report's target; a budget's axis
        is not in the mesh; the report was not compared with a traced program.

    Example:
      >>> import tempfile
      >>> from txcore.profiling import audit
      >>> report = audit(jnp.sin, jnp.ones(3))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     print(update(f"{folder}/sine.lock.json", report).ok)
      ...     print(check(f"{folder}/sine.lock.json", report).text)
      True
      lock: 0 entries as locked for cpu:1
    """
    locks = read_locks(path)
    target = target_of(report)
    if target not in locks:
        has = printable(", ".join(sorted(locks))) or "none"
        raise LockError(f"{path} needs a section {target!r}, but has {has}: lock this target first")
    locked = locks[target]
    report = report.allowing(locked.allow)
    if not report.ok:
        return Outcome(False, True, str(report))
    now = lock_of(report)
    changes = compare(locked, now)
    other = _describe_settings(locked, now)
    over = list_over_budget(report, locked.budgets)
    ok = not over and not any(change.grew or exact for change in changes) and not (other and exact)
    said = [*write_changes(changes), *other, _summary_line(changes, locked, exact), *over]
    return Outcome(ok, bool(changes or other), "\n".join(said))


def update(
    path: str | os.PathLike[str],
    report: Report,
    *,
    budgets: Mapping[str, int | None] | None = None,
    allow: Iterable[str] | None = None,
    proof: Proof | None = None,
) -> Outcome:
    """Write a program's communication into its lock file, and make the file where there is none.

    Other targets' sections stay as they are, and so do the budgets that are not given.

    Args:
      path: the lock file.
      report: of `audit`, on the target to lock.
      budgets: bytes on the wire that each device may send in one call, by mesh axis; None removes
        an axis's budget. A collective over several axes counts for each of them, and one over
        groups that no mesh axes form counts for all. Opaque calls count nothing, since nobody
        knows what they send; they are in the lock, so that a new one is growth.
      allow: the origins of what nobody asked for that are locked, too, so that only more of it
        fails: see `Report.allowing`. None keeps those of the file, () removes them.
      proof: what the program is (`proof_of(program)`), so that a run can be held to it: see
        `txcore.attested`. It takes the place of one of the same versions of jax.

    Returns:
      The outcome. Where the report is not ok or over a budget it is not ok, and nothing is written.

    Raises:
      LockError: the file cannot be read or written; a budget's axis is not in the mesh; the report
        was not compared with a traced program.
    """
    locks = read_locks(path) if os.path.lexists(path) else {}
    target = target_of(report)
    old = locks.get(target, Lock(target, ()))
    allowed = old.allow if allow is None else tuple(sorted(check_allowed(allow)))
    report = report.allowing(allowed)
    if not report.ok:
        return Outcome(False, False, str(report))
    wanted = {**old.budgets, **(budgets or {})}
    new = replace(
        lock_of(report),
        budgets={axis: most for axis, most in wanted.items() if most is not None},
        allow=allowed,
        proofs=_add_proof(old.proofs, proof),
    )
    if over := list_over_budget(report, new.budgets):
        return Outcome(False, False, "\n".join([*over, f"{path} is left as it was"]))
    changed = locks.get(new.target) != new
    write_file(path, format_locks([*{**locks, new.target: new}.values()]))
    said = (
        f"{path}: {_count_entries(new)} locked for {new.target}{'' if changed else ', as before'}"
    )
    differing = [*write_changes(compare(old, new)), *_describe_settings(old, new)]
    return Outcome(True, changed, "\n".join([*differing, said]))


def _describe_settings(locked: Lock, now: Lock) -> list[str]:
    """Return a line for what was compiled otherwise than what is locked."""
    was, used = locked.compiled_with, now.compiled_with
    names = sorted(name for name in {*was, *used} if was.get(name) != used.get(name))
    shown = [f"{name} {_quoted(was.get(name))} -> {_quoted(used.get(name))}" for name in names]
    return [f"compiled with other settings: {printable(', '.join(shown))}"] if shown else []


def _quoted(text: str | None) -> str:
    return "default" if text is None else repr(text)


def _add_proof(proofs: tuple[Proof, ...], proof: Proof | None) -> tuple[Proof, ...]:
    if proof is None:
        return proofs
    others = [other for other in proofs if other.versions != proof.versions]
    return tuple(sorted((*others, proof), key=lambda one: sorted(one.versions.items())))


def list_over_budget(report: Report, budgets: Mapping[str, int]) -> list[str]:
    """List the axes on which a program is over its budget, or not proved to be within it."""
    axes = [name for name, _ in report.mesh]
    found = []
    for axis, most in sorted(budgets.items()):
        if axis not in axes:
            has = f"has {', '.join(axes)}" if axes else "is none"
            raise LockError(
                f"a budget needs an axis of the mesh, which {has}, but got {axis!r}: leave it out"
            )
        rows = [row for row in report.collectives if axis in row.axes or not row.axes]
        sent = sum(row.wire_bytes * row.trips for row in rows)
        endless = [row for row in rows if row.wire_bytes and not row.trips_known]
        if sent > most:
            found.append(
                f"over budget: each device sends {sent:,} B a call over {axis}, at most {most:,} B "
                "are allowed"
            )
        elif endless:
            found.append(
                f"no proof of the budget of {axis}: the {endless[0].kind} at "
                f"{endless[0].source or '?'} runs in a loop of unknown length"
            )
    return found


def _summary_line(changes: Sequence[Change], locked: Lock, exact: bool) -> str:
    total, grown = len(changes), sum(change.grew for change in changes)
    if grown:
        return f"lock: {grown} of {total} changed entries grew: review, then update the lock"
    if changes and exact:
        return f"lock: {total} smaller or gone, and it has to be exact: update the lock"
    if changes:
        return f"lock: nothing grew; {total} smaller or gone: update the lock to keep that"
    return f"lock: {_count_entries(locked)} as locked for {locked.target}"


def _count_entries(lock: Lock) -> str:
    return f"{len(lock.entries)} {'entry' if len(lock.entries) == 1 else 'entries'}"
