"""Write the last line of a report: the status, and the reason."""

from collections import Counter
from collections.abc import Iterable

from txcore.outside import printable
from txcore.profiling.report.findings import Findings, list_doubts
from txcore.profiling.report.numbers import format_bytes
from txcore.profiling.report.rows import Collective, PlanLine

_NAMED = 3
_DIVERGENT = {"hangs": "that not all devices reach", "lies": "of a false type"}


def write_verdict(report: Findings) -> str:
    """Return the status and its reason in one line."""
    reason = _describe_found(report) if report.ok else "; ".join(_list_faults(report))
    return printable(f"{report.status}: {reason}")


def _describe_found(report: Findings) -> str:
    """Describe what a program without a fault sends, and why it is not proved if it is not."""
    rows = report.collectives
    doubts = [] if report.checked else ["there is no traced program to compare with"]
    doubts += list_doubts(rows, report.fates)
    but = f", but {' and '.join(doubts)}" if doubts else ""
    if not rows:
        return f"no collective {'in the program' if report.checked else 'found'}{but}"
    passed = report.let_through
    origins = _count_origins(c for c in rows if c not in passed)
    through = f", {len(passed)} let through ({_count_origins(passed)})" if passed else ""
    declared = f"{len(rows) - len(passed) if passed else 'all'} declared ({origins or 'none'})"
    nothing = "nothing else" if passed else "nothing"
    is_known = all(c.trips_known and c.payload_known for c in rows)
    payload = ("" if is_known else "at least ") + format_bytes(report.payload_bytes)
    sent = f"{_count_noun(len(rows), 'collective')}, {payload} payload a call"
    if not report.checked:
        looks = f"{nothing} looks added ({origins or 'none'})"
        return f"{sent}{through}, {looks}{but}"
    planned = _as_planned(report.plan)
    planned += "".join(map(_describe_how_often, report.plan))
    planned += "".join(f", {line.factor_note}" for line in report.plan if line.factor_note)
    return f"{sent}, {declared}{planned}{through}; {nothing} was added{but}"


def _count_origins(rows: Iterable[Collective]) -> str:
    counts = Counter(c.origin for c in rows)
    return ", ".join(f"{count} {origin}" for origin, count in sorted(counts.items()))


def _describe_how_often(line: PlanLine) -> str:
    """Describe what is not sent once in a call, or nothing."""
    often = f", the {line.what} in 1 call of {line.every}" if line.every > 1 else ""
    if line.times == 1:
        return often
    advice = ": add up what it computes, and reduce the sum after it"
    often += f", but {line.times} times the {line.what}, once in each trip of a loop"
    return often + (advice if line.kind == "all-reduce" else "")


def _as_planned(plan: tuple[PlanLine, ...]) -> str:
    if not any(line.payload_bytes for line in plan):
        return ""
    beyond = sum(line.found_bytes for line in plan if not line.payload_bytes)
    return ", as the plan predicts" + (f" and {format_bytes(beyond)} beyond" if beyond else "")


def _count_noun(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _list_faults(report: Findings) -> list[str]:
    faults = []
    if unexplained := report.unexplained:
        total = _count_noun(len(report.collectives), "collective")
        named = [_describe_row(c) for c in unexplained[:_NAMED]]
        some = _list_some(named, len(unexplained))
        faults.append(f"{len(unexplained)} of {total} unexplained: {some}")
    if report.missing:
        named = [
            f"{d.tag or d.primitive} over {'+'.join(d.axes)} at {d.source or '?'}"
            for d in report.missing
        ]
        faults.append(f"{len(named)} declared but missing: {_list_some(named)}")
    for problem, text in _DIVERGENT.items():
        if named := [str(d) for d in report.divergent if d.problem == problem]:
            faults.append(f"{len(named)} {text}: {_list_some(named)}")
    faults += [
        f"the plan predicts {line.payload_bytes:,} B of {line.what} ({line.dtype} {line.kind} over "
        f"{'+'.join(line.axes)}), found {line.found_bytes + line.eliminated_bytes:,} B"
        for line in report.plan
        if not line.is_there
    ]
    faults += [line.factor_note for line in report.plan if line.factor == "sum"]
    return faults


def _describe_row(row: Collective) -> str:
    axes = f" over {'+'.join(row.axes)}" if row.axes else ""
    place = f" at {row.source}" if row.source else ""
    note = f": {row.note}" if row.note else ""
    return f"{row.kind}{axes}{place} ({row.origin}{note})"


def _list_some(named: list[str], count: int | None = None) -> str:
    more = (len(named) if count is None else count) - _NAMED
    return ", ".join(named[:_NAMED]) + (f" and {more} more" if more > 0 else "")
