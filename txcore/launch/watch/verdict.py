"""Whether a run has to end, and why: what the ranks' entries say."""

from collections.abc import Callable, Iterable, Mapping

from txcore.launch.watch.status import FAILED, TIMED, TRY_AGAIN, Entry, Verdict, how_ended

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
    names = _cut([str(number) for number in sorted(numbers)], MOST_NAMED)
    if len(names) == 1:
        return f"{what} {names[0]}"
    return f"{what}s {', '.join(names[:-1])} and {names[-1]}"


def _cut(names: list[str], most: int) -> list[str]:
    few = len(names) <= most + 1  # no "and 1 others"
    return names if few else [*names[:most], f"{len(names) - most} others"]


def judge(
    table: Mapping[int, Entry],
    silent: Mapping[int, float],
    *,
    peer_timeout_s: float,
    suspect_s: float,
    step_timeout_s: float,
    order: Callable[[Mapping[int, Entry]], Verdict | None] = lambda table: None,
    ends: Mapping[int, int] | None = None,
) -> Verdict | None:
    """Say whether the run has to end, and why.

    Args:
      table: the last entry of each rank; a rank that has not written any is absent.
      silent: for every rank, the seconds since its counter last changed.
      peer_timeout_s: after how long a silent rank counts as dead.
      suspect_s: the same where some rank has lost a connection already.
      step_timeout_s: how long a step may take.
      order: says who came to something else than others (`Order.judge`).
      ends: the exit codes of ranks of which the launcher says that they have ended.

    Returns:
      The verdict; None where the run goes well.
    """
    return (
        _failed(table)
        or _gone(table, ends or {})
        or _silent(table, silent, peer_timeout_s, suspect_s)
        or order(table)
        or _ended(table, peer_timeout_s)
        or _cut_off(table, silent, peer_timeout_s)
        or _too_long(table, step_timeout_s)
    )


def _failed(table: Mapping[int, Entry]) -> Verdict | None:
    rows = [
        f"rank {rank} failed {_where(entry)}: {entry.failed}"
        for rank, entry in sorted(table.items())
        if entry.failed
    ]
    return Verdict("; ".join(_cut(rows, 3)), FAILED) if rows else None


def _gone(table: Mapping[int, Entry], ends: Mapping[int, int]) -> Verdict | None:
    """Name those that have ended without having said so; those that did are judged by `_ended`."""
    gone = {r: c for r, c in sorted(ends.items()) if not (r in table and table[r].ended)}
    rows = [f"rank {r} {how_ended(code)}{last_seen([r], table)}" for r, code in gone.items()]
    killed = all(code < 0 for code in gone.values())
    return Verdict("; ".join(_cut(rows, 3)), TRY_AGAIN if killed else FAILED) if gone else None


def _silent(
    table: Mapping[int, Entry], silent: Mapping[int, float], peer_timeout_s: float, suspect_s: float
) -> Verdict | None:
    limit = suspect_s if any(entry.lost for entry in table.values()) else peer_timeout_s
    lost = [r for r, s in silent.items() if s >= limit and not (r in table and table[r].ended)]
    if not lost:
        return None
    return Verdict(silence(lost, min(silent[rank] for rank in lost), table))


def silence(lost: list[int], seconds: float, table: Mapping[int, Entry]) -> str:
    """Return the text about ranks that have not been heard of for so long."""
    have = "has" if len(lost) == 1 else "have"
    return (
        f"{rank_names(lost)} {have} not been heard of for {seconds:.0f} s: killed, stopped, or cut "
        f"off from the network{last_seen(lost, table)}"
    )


def coordinator_gone(table: Mapping[int, Entry]) -> str:
    """Return the text about rank 0 where its connections are closed."""
    return f"rank 0 is gone, and with it the coordinator: killed or crashed{last_seen([0], table)}"


def last_seen(ranks: Iterable[int], table: Mapping[int, Entry]) -> str:
    """Return "; last seen" and where these ranks were, "" where none has told."""
    places = list(dict.fromkeys(_where(table[rank]) for rank in sorted(ranks) if rank in table))
    return f"; last seen {', '.join(_cut(places, 3))}" if places else ""


def _ended(table: Mapping[int, Entry], peer_timeout_s: float) -> Verdict | None:
    """Blame those that ended their program while others wait for them."""
    ended = [rank for rank, entry in table.items() if entry.ended]
    left = {rank: entry for rank, entry in table.items() if not entry.ended}
    hangs = [r for r, e in left.items() if e.lost or (_timed(e) and e.seconds >= peer_timeout_s)]
    early = [r for r in ended if any(table[r].step <= table[h].step for h in hangs)]
    if not early:
        return _never_comes(table, peer_timeout_s)
    waits = [rank for rank, entry in left.items() if entry.lost or _timed(entry)]
    step = max(table[rank].step for rank in waits)
    places = ", ".join(dict.fromkeys(_where(table[rank]) for rank in sorted(early)))
    return Verdict(
        f"{rank_names(early)} ended the program {places}, but {rank_names(waits)} "
        f"{'waits' if len(waits) == 1 else 'wait'} for it in step {step}: every rank has to make "
        "the same steps (is there less data on one, or a sys.exit()?)",
        FAILED,
    )


def _never_comes(table: Mapping[int, Entry], peer_timeout_s: float) -> Verdict | None:
    """Blame those that ended though others came to what needs them."""
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


def _cut_off(
    table: Mapping[int, Entry], silent: Mapping[int, float], peer_timeout_s: float
) -> Verdict | None:
    """Say that a connection broke though every rank lives."""
    rows = [r for r, e in table.items() if e.lost and e.seconds >= peer_timeout_s and not e.ended]
    if not rows:
        return None
    return Verdict(
        f"{rank_names(rows)} lost a connection, though every rank is alive: {table[min(rows)].lost}"
    )


def _too_long(table: Mapping[int, Entry], step_timeout_s: float) -> Verdict | None:
    waits = [r for r, e in table.items() if _timed(e) and not e.ended]
    if not any(table[rank].seconds >= step_timeout_s for rank in waits):
        return None
    front = max((table[rank].step, True) for rank in waits)
    behind = [r for r, e in table.items() if (e.step, _timed(e) and not e.ended) < front]
    places = [f"rank {r} is {_where(table[r])} for {table[r].seconds:.0f} s" for r in behind]
    who = "; ".join(_cut(places, MOST_NAMED)) or "every rank waits in it"
    return Verdict(f"step {front[0]} takes more than {step_timeout_s:g} s: {who}")


def _timed(entry: Entry) -> bool:
    return entry.phase in TIMED


def _where(entry: Entry) -> str:
    return f"at step {entry.step} ({entry.phase})"
