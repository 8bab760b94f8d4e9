"""Exchange text between processes through the coordinator, without a backend or a collective."""

import json
from collections.abc import Callable
from typing import Any

from txcore import _compat
from txcore.launch import watch
from txcore.launch.watch.verdict import rank_names

MEET_S = 1800.0  # for all processes to arrive, which may have other work to finish
LONGEST = 2000  # characters of one process's problem


def world_size() -> int:
    """Return the number of processes of the run, without starting a backend.

    Example:
      >>> from txcore import launch
      >>> launch.world_size()
      1
    """
    return _compat.coordination_size()


def barrier(name: str, *, timeout_s: float = MEET_S) -> None:
    """Wait on the host until every process has come to the barrier `name`.

    Args:
      name: the barrier; each is used once.
      timeout_s: seconds to wait.

    Raises:
      RuntimeError: a process did not come in time.

    Example:
      >>> tx.barrier("data-is-there")  # alone: returns at once
    """
    client = _compat.coordination_client()
    if client is not None:
        watch.meet(f"the barrier {name!r}")
        client.wait_at_barrier(f"txcore/{name}", int(timeout_s * 1000))


def share(name: str, value: str, *, timeout_s: float = MEET_S) -> str:
    """Return process 0's `value` on every process.

    Args:
      name: what is shared; each name is used once.
      value: the text; only process 0's counts.
      timeout_s: seconds to wait for process 0.

    Returns:
      The text of process 0.

    Raises:
      RuntimeError: process 0 did not come in time.

    Example:
      >>> from txcore import launch
      >>> launch.share("dataset", "mnist")  # alone: its own
      'mnist'
    """
    client = _compat.coordination_client()
    if client is None:
        return value
    if _compat.coordination_rank() == 0:
        client.key_value_set(f"txcore/{name}", value)
        return value
    return client.blocking_key_value_get(f"txcore/{name}", int(timeout_s * 1000))


def gather(name: str, value: str, *, timeout_s: float = MEET_S) -> list[str]:
    """Return the text of every process, by rank, on every process alike.

    Process 0 collects the texts and sends all of them back: two messages a process.

    Args:
      name: what is gathered; each name is used once, and is the same on every process.
      value: this process's text.
      timeout_s: seconds to wait for each of the others.

    Returns:
      The texts, as many as there are processes.

    Raises:
      RuntimeError: a process did not come in time.

    Example:
      >>> from txcore.launch import key_value
      >>> key_value.gather("batches", "12")  # alone: its own
      ['12']
    """
    client, world = _compat.coordination_client(), _compat.coordination_size()
    if client is None or world == 1:
        return [value]
    rank, folder = _compat.coordination_rank(), f"txcore/{name}/"
    watch.meet(f"an exchange of {name!r}")
    if rank != 0:
        client.key_value_set(f"{folder}said/{rank}", value)
        return json.loads(client.blocking_key_value_get(f"{folder}all", int(timeout_s * 1000)))
    others = (
        client.blocking_key_value_get(f"{folder}said/{r}", int(timeout_s * 1000))
        for r in range(1, world)
    )
    values = [value, *others]
    client.key_value_set(f"{folder}all", json.dumps(values))
    client.key_value_delete(f"{folder}said/")
    return values


def agree_on_problem(
    name: str,
    problem: str | None,
    conclude: Callable[[], str | None] = lambda: None,
    *,
    timeout_s: float = MEET_S,
) -> str | None:
    """Return the problems that any process has found, on every process alike; None without any.

    Every process reports how its part went, process 0 collects the reports and returns the outcome:
    two messages a process. A process that failed has to call it as well, so that the others do not
    wait for it.

    Args:
      name: what is agreed on; each name is used once, and is the same on every process.
      problem: the problem of this process; None without one.
      conclude: called on process 0 alone, before the others go on, if all are well; returns what
        went wrong.
      timeout_s: seconds that process 0 waits for each of the others.

    Returns:
      The problem; if only some ranks have it, with their numbers.

    Raises:
      RuntimeError: process 0 did not answer in time.

    Example:
      >>> from txcore.launch import key_value
      >>> key_value.agree_on_problem("folder", "it is full")  # alone: its own
      'it is full'
    """
    client, world = _compat.coordination_client(), _compat.coordination_size()
    if client is None or world == 1:
        return problem if problem is not None else conclude()
    rank, folder = _compat.coordination_rank(), f"txcore/{name}/"
    word = json.dumps(problem if problem is None else problem[:LONGEST])
    if rank != 0:
        client.key_value_set(f"{folder}said/{rank}", word)
        wait_ms = int(2 * timeout_s * 1000)  # process 0 names who is late before
        return json.loads(client.blocking_key_value_get(f"{folder}all", wait_ms))
    words = {0: json.loads(word), **_collect_problems(client, f"{folder}said/", world, timeout_s)}
    verdict = _join_problems({r: said for r, said in words.items() if said is not None}, world)
    if verdict is None:
        said = conclude()
        verdict = None if said is None else _join_problems({0: said}, world)
    client.key_value_set(f"{folder}all", json.dumps(verdict))
    client.key_value_delete(f"{folder}said/")
    return verdict


def _collect_problems(
    client: Any, folder: str, world: int, timeout_s: float
) -> dict[int, str | None]:
    """Return the problem of each other process; the problem of a late one is that it is late."""
    heard: dict[int, str | None] = {}
    for rank in range(1, world):
        try:
            said = client.blocking_key_value_get(f"{folder}{rank}", int(timeout_s * 1000))
            heard[rank] = json.loads(said)
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            heard[rank] = f"not heard of for {timeout_s:g} s"
            timeout_s = 1.0  # the others have had as long
    return heard


def _join_problems(problems: dict[int, str], world: int) -> str | None:
    """Return the problems of all processes as one text, equal ones once."""
    ranks: dict[str, list[int]] = {}
    for rank in sorted(problems):
        ranks.setdefault(problems[rank], []).append(rank)
    if len(ranks) == 1 and len(problems) == world:
        return next(iter(ranks))
    return "; ".join(f"{rank_names(who)}: {text}" for text, who in ranks.items()) or None
