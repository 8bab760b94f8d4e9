"""Judge from the ranks' entries whether a run has to end, and why."""

from collections.abc import Callable, Iterable, Mapping

from txcore.launch.watch.status import FAILED, TIMED, TRY_AGAIN, RankEntry, Verdict, how_ended

MOST_NAMED = 8  # ranks in a message


def rank_names(ranks: Iterable[int]) -> str:
    """Return "rank 1", or "ranks 0, 2 and 5"; many are cut.

    Example:
      >>> from txcore.launch.watch.verdict import rank_names
      >>> rank_names([3]), rank_names([0, 2, 5]), rank_names(range(100))[-18:]
      ('rank 3', 'ranks 0, 2 and 5', '6, 7 and 92 others')
    """
    return name_each("rank", ranks)


def name_each(what: str, numbers: Iterable[int]) -> str:
    """Return "device 1", or "devices 0, 2 and 5"; many are cut."""
    names = _cut_names([str(number) for number in sorted(numbers)], MOST_NAMED)
    if len(names) == 1:
        return f"{what} {names[0]}"
    return f"{what}s {', '.join(names[:-1])} and {names[-1]}"


def _cut_names(names: list[str], most: int) -> list[str]:
    few = len(names) <= most + 1  # no "and 1 others"
    return names if few else [*names[:most], f"{len(names) - most} others"]


def judge_run(
    table: Mapping[int, RankEntry],
    silent: Mapping[int, float],
    *,
    peer_timeout_s: float,
    suspect_s: float,
    step_timeout_s: float,
    order: Callable[[Mapping[int, RankEntry]], Verdict | None] = lambda table: None,
    ends: Mapping[int, int] | None = None,
) -> Verdict | None:
    """Return a verdict if the run has to end.

    Args:
      table: the last entry of each rank; a rank without an entry is absent.
      silent: for every rank, the seconds since its counter last changed.
      peer_timeout_s: seconds after which a silent rank counts as dead.
      suspect_s: as peer_timeout_s, once some rank has lost a connection.
      step_timeout_s: seconds that a step may take.
      order: finds ranks whose events differ from others' (`Order.judge`).
      ends: the exit codes of ranks that the launcher reports as ended.

    Returns:
      The verdict; None if the run goes well.
    """
    return (
        _judge_failed(table)
        or _judge_gone(table, ends or {})
        or _judge_silent(table, silent, peer_timeout_s, suspect_s)
        or order(table)
        or _judge_ended(table, peer_timeout_s)
        or _judge_cut_off(table, silent, peer_timeout_s)
        or _judge_overdue(table, step_timeout_s)
    )


def _judge_failed(table: Mapping[int, RankEntry]) -> Verdict | None:
    rows = [
        f"rank {rank} failed {_describe_place(entry)}: {entry.failed}"
        for rank, entry in sorted(table.items())
        if entry.failed
    ]
    return Verdict("; ".join(_cut_names(rows, 3)), FAILED) if rows else None


def _judge_gone(table: Mapping[int, RankEntry], ends: Mapping[int, int]) -> Verdict | None:
    """Name ranks that ended without announcing it; `_judge_ended` handles those that did."""
    gone = {r: c for r, c in sorted(ends.items()) if not (r in table and table[r].ended)}
    rows = [f"rank {r} {how_ended(code)}{last_seen([r], table)}" for r, code in gone.items()]
    killed = all(code < 0 for code in gone.values())
    return (
        Verdict("; ".join(_cut_names(rows, 3)), TRY_AGAIN if killed else FAILED) if gone else None
    )


def _judge_silent(
    table: Mapping[int, RankEntry],
    silent: Mapping[int, float],
    peer_timeout_s: float,
    suspect_s: float,
) -> Verdict | None:
    limit = suspect_s if any(entry.lost for entry in table.values()) else peer_timeout_s
    lost = [r for r, s in silent.items() if s >= limit and not (r in table and table[r].ended)]
    if not lost:
        return None
    return Verdict(describe_silence(lost, min(silent[rank] for rank in lost), table))


def describe_silence(lost: list[int], seconds: float, table: Mapping[int, RankEntry]) -> str:
    """Describe ranks that have been silent for too long."""
    have = "has" if len(lost) == 1 else "have"
    return (
        f"{rank_names(lost)} {have} not been heard of for {seconds:.0f} s: killed, stopped, or cut "
        f"off from the network{last_seen(lost, table)}"
    )


def describe_lost_coordinator(table: Mapping[int, RankEntry]) -> str:
    """Describe the loss of rank 0, whose connections are closed."""
    return f"rank 0 is gone, and with it the coordinator: killed or crashed{last_seen([0], table)}"


def last_seen(ranks: Iterable[int], table: Mapping[int, RankEntry]) -> str:
    """Return "; last seen" and the places of these ranks, "" if none is known."""
    places = list(
        dict.fromkeys(_describe_place(table[rank]) for rank in sorted(ranks) if rank in table)
    )
    return f"; last seen {', '.join(_cut_names(places, 3))}" if places else ""


def _judge_ended(table: Mapping[int, RankEntry], peer_timeout_s: float) -> Verdict | None:
    """Blame the ranks that ended their program while others wait for them."""
    ended = [rank for rank, entry in table.items() if entry.ended]
    left = {rank: entry for rank, entry in table.items() if not entry.ended}
    hangs = [r for r, e in left.items() if e.lost or (_is_timed(e) and e.seconds >= peer_timeout_s)]
    early = [r for r in ended if any(table[r].step <= table[h].step for h in hangs)]
    if not early:
        return _judge_never_coming(table, peer_timeout_s)
    waits = [rank for rank, entry in left.items() if entry.lost or _is_timed(entry)]
    step = max(table[rank].step for rank in waits)
    places = ", ".join(dict.fromkeys(_describe_place(table[rank]) for rank in sorted(early)))
    return Verdict(
        f"{rank_names(early)} ended the program {places}, but {rank_names(waits)} "
        f"{'waits' if len(waits) == 1 else 'wait'} for it in step {step}: every rank has to make "
        "the same steps (is there less data on one, or a sys.exit()?)",
        FAILED,
    )


def _judge_never_coming(table: Mapping[int, RankEntry], peer_timeout_s: float) -> Verdict | None:
    """Blame the ranks that ended before an event that others have come to."""
    ended = {rank: entry.count for rank, entry in table.items() if entry.ended}
    ahead = {
        rank: entry
        for rank, entry in table.items()
        if not entry.ended and entry.waits >= peer_timeout_s
    }
    early = [rank for rank, count in ended.items() if any(count < e.count for e in ahead.values())]
    if not early:
        return None
    further = [rank for rank, e in ahead.items() if e.count > min(ended[r] for r in early)]
    events = dict.fromkeys(ahead[rank].events.rpartition("\n")[2] for rank in further)
    return Verdict(
        f"{rank_names(early)} ended the program, but {rank_names(further)} came to "
        f"{', '.join(events)} after that, which needs every rank: see what only one of them does",
        FAILED,
    )


def _judge_cut_off(
    table: Mapping[int, RankEntry], silent: Mapping[int, float], peer_timeout_s: float
) -> Verdict | None:
    """Report a connection that broke though every rank lives."""
    rows = [r for r, e in table.items() if e.lost and e.seconds >= peer_timeout_s and not e.ended]
    if not rows:
        return None
    return Verdict(
        f"{rank_names(rows)} lost a connection, though every rank is alive: {table[min(rows)].lost}"
    )


def _judge_overdue(table: Mapping[int, RankEntry], step_timeout_s: float) -> Verdict | None:
    waits = [r for r, e in table.items() if _is_timed(e) and not e.ended]
    if not any(table[rank].seconds >= step_timeout_s for rank in waits):
        return None
    front = max((table[rank].step, True) for rank in waits)
    behind = [r for r, e in table.items() if (e.step, _is_timed(e) and not e.ended) < front]
    places = [
        f"rank {r} is {_describe_place(table[r])} for {table[r].seconds:.0f} s" for r in behind
    ]
    who = "; ".join(_cut_names(places, MOST_NAMED)) or "every rank waits in it"
    return Verdict(f"step {front[0]} takes more than {step_timeout_s:g} s: {who}")


def _is_timed(entry: RankEntry) -> bool:
    return entry.phase in TIMED


def _describe_place(entry: RankEntry) -> str:
    return f"at step {entry.step} ({entry.phase})"
