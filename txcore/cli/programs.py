"""What the processes of an inspected command wrote down, and its summary for people."""

import json
import pathlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from txcore.outside import printable

_Line = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """All that was seen of a command.

    Attributes:
      programs: what its processes compiled, a line each, rank by rank in their order.
      began: a line for each process in which jax started.
      unseen: how many programs got past the watch, by kind: "compiled", "loaded".
      moves: the `jax.device_put`s between devices.
      failed: why a process could not be watched, or a program not be audited.
      differing: what differs between ranks.
      stopped: whether it was ended after `--first` programs.
    """

    programs: tuple[_Line, ...]
    began: tuple[_Line, ...]
    unseen: tuple[tuple[str, int], ...]
    moves: tuple[_Line, ...]
    failed: tuple[str, ...]
    differing: tuple[str, ...]
    stopped: bool


def read_run(folder: str) -> Run:
    """Read what the processes of a command have written."""
    files = sorted(pathlib.Path(folder).glob("*.jsonl"), key=lambda f: f.stat().st_mtime_ns)
    lines = [line for file in files for line in _read_lines(file)]
    of = {what: [line for line in lines if line["what"] == what] for what in _WHAT}
    programs = sorted(of["program"], key=lambda line: line["rank"])  # stable: in their order
    unseen = Counter(line["kind"] for line in of["unseen"])
    notes = sorted(pathlib.Path(folder).glob("*.failed"))
    failed = [f"a process was not watched: {note.read_text().strip()}" for note in notes]
    failed += [f"not audited: {line['text']}" for line in of["failed"]]
    return Run(
        tuple(programs),
        tuple(of["began"]),
        tuple(sorted(unseen.items())),
        tuple(of["move"]),
        tuple(failed),
        tuple(_compare_ranks(programs)),
        bool(of["stopped"]),
    )


_WHAT = ("program", "began", "unseen", "move", "stopped", "failed")


def _read_lines(file: pathlib.Path) -> list[_Line]:
    """Read a process's lines; the last one may be cut off, as it is where a disk is full."""
    lines = []
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append({**json.loads(text), "process": int(file.stem)})
        except ValueError:
            lines.append({"what": "unseen", "kind": "cut off"})
    return lines


def is_ok(run: Run) -> bool:
    """Tell whether something was compiled, all of it is ok, and the ranks agree."""
    bad = any(program["status"] == "failed" for program in run.programs)
    return bool(run.programs) and not (bad or run.differing or run.failed)


def status_of(run: Run) -> str:
    """Return "failed", "proved", or "not proved" where not everything was seen."""
    if not is_ok(run):
        return "failed"
    proved = all(program["status"] == "proved" for program in run.programs)
    return "proved" if proved and not run.unseen and not run.moves else "not proved"


def to_dict(run: Run, exit_code: int) -> dict[str, Any]:
    """Return a run as plain lists, numbers and strings."""
    programs = [{k: v for k, v in p.items() if k not in ("what", "text")} for p in run.programs]
    return {
        "status": status_of(run),
        "exit_code": exit_code,
        "programs": programs,
        "processes": len(run.began),
        "unseen": dict(run.unseen),
        "moves": [{k: v for k, v in m.items() if k not in ("what", "process")} for m in run.moves],
        "failed": list(run.failed),
        "differing": list(run.differing),
        "stopped": run.stopped,
    }


def describe_run(run: Run, exit_code: int) -> str:
    """Write a run for people: each program that communicates, then the summary."""
    sections = [_describe_program(program) for program in _of_one_rank(run.programs)]
    return "\n".join([*filter(None, sections), *_describe_rest(run), _summary(run, exit_code)])


def _of_one_rank(programs: Sequence[_Line]) -> list[_Line]:
    """Leave out what a rank shares with an earlier one: the comparison tells what differs."""
    seen: Counter[Any] = Counter()
    chosen = []
    for _, of_rank in _by_rank(programs):
        here: Counter[Any] = Counter()
        for program in of_rank:
            here[_key(program)] += 1
            if program["processes"] == 1 or here[_key(program)] > seen[_key(program)]:
                chosen.append(program)
        seen |= here
    return chosen


def _by_rank(programs: Iterable[_Line]) -> list[tuple[int, list[_Line]]]:
    ranks: dict[int, list[_Line]] = {}
    for program in programs:
        ranks.setdefault(program["rank"], []).append(program)
    return sorted(ranks.items())


def _key(program: _Line) -> tuple[str, str]:
    return program["name"], program["digest"]


def _describe_program(program: _Line) -> str:
    if not program["text"]:
        return ""
    rank = f" on rank {program['rank']}" if program["ranks"] > 1 else ""
    page = f" ({program['page']})" if program.get("page") else ""
    at = f", compiled at {program['called_at']}" if program["called_at"] else ""
    head = printable(f"== {program['name']}{at}{rank}{page}")
    return f"{head}\n{program['text']}\n"


def _compare_ranks(programs: Sequence[_Line]) -> list[str]:
    """Compare the programs over several processes that each rank compiled, in any order."""
    shared = [program for program in programs if program["processes"] > 1]
    if not shared:
        return []
    counts = {rank: Counter(map(_key, of)) for rank, of in _by_rank(shared)}
    size = max(program["ranks"] for program in shared)
    found = [f"rank {rank} of {size} was not seen" for rank in range(size) if rank not in counts]
    first, *others = sorted(counts)
    for rank in others:
        more = [(r, counts[r] - counts[o]) for r, o in ((first, rank), (rank, first))]
        for r, keys in more:
            names = ", ".join(dict.fromkeys(name for name, _ in keys))
            if names:
                other = rank if r == first else first
                otherwise = f"rank {other} did not, or with other collectives"
                found.append(f"rank {r} compiled {names}, and {otherwise}")
    return found


_UNSEEN = {
    "compiled": "compiled by another way than jax's own: not seen",
    "loaded": "loaded from a serialized executable: not seen",
    "cut off": "written down only in part",
}


def _describe_rest(run: Run) -> list[str]:
    lines = [f"{printable(line)}" for line in run.differing]
    lines += [f"{count} {_UNSEEN.get(kind, kind)}" for kind, count in run.unseen]
    lines += [printable(text) for text in run.failed]
    places = Counter(move["source"] or "?" for move in run.moves)
    if places:
        named = ", ".join(list(places)[:3]) + (" and more" if len(places) > 3 else "")
        lines.append(f"jax.device_put sends between devices, in no program, at {printable(named)}")
    return lines


def _summary(run: Run, exit_code: int) -> str:
    ended = "; stopped after --first" if run.stopped else ""
    ended += f"; the command's exit code is {exit_code}" if exit_code else ""
    if not run.programs:
        said = (
            "jax started, but compiled nothing"
            if run.began
            else "jax started in no process that could be seen (python -I, -E and a "
            "PYTHONPATH of its own keep txcore out)"
        )
        return f"failed: {said}: nothing is proved{ended}"
    states = Counter(program["status"] for program in run.programs)
    counted = ", ".join(f"{states[s]} {s}" for s in ("failed", "not proved", "proved") if states[s])
    silent = sum(not program["report"]["collectives"] for program in run.programs)
    processes = len({program["process"] for program in run.programs})
    in_all = f" in {processes} processes" if processes > 1 else ""
    number = len(run.programs)
    return (
        f"{status_of(run)}: {number} program{'' if number == 1 else 's'}{in_all}: {counted}; "
        f"{silent} without a collective{ended}"
    )
