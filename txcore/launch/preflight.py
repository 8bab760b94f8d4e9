"""Check before a program's first run that all ranks run the same one: otherwise they would hang."""

import contextlib
import difflib
import hashlib
import itertools
import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from txcore import _compat, version
from txcore.launch import settings, watch
from txcore.launch.watch.status import MismatchError as MismatchError
from txcore.launch.watch.verdict import rank_names

Facts = Mapping[str, str | Sequence[str]]

FOLDER = "txcore/preflight/"
READ_S = 10.0  # how long a rank waits until all have read the difference
MOST_GROUPS = 3  # of differing ranks in a message
MOST_LINES = 24  # of the difference in one fact
MOST_COMPARED = 200  # lines from the first that differs
LONGEST_LINE = 300

_calls = itertools.count()


PROBLEM = "the ranks would run different programs"
REMEDY = (
    "Nothing was run. Start every rank with the same script, arguments, settings, data and packages"
)


def check(
    name: str,
    facts: Facts,
    *,
    timeout_s: float = 300.0,
    problem: str = PROBLEM,
    remedy: str = REMEDY,
) -> None:
    """Compare what all ranks are about to run; every rank has to call it.

    A digest of the facts goes through the coordinator, and the facts themselves if they differ.

    Args:
      name: what is about to run ("train_step").
      facts: what has to be the same on every rank: a text or a list of lines for each title
        (`facts_of`).
      timeout_s: seconds to wait for the others, which may still be compiling.
      problem: the first words of the message if the facts differ.
      remedy: the last words of the message: what to do about it.

    Raises:
      MismatchError: the facts differ, on every rank with the same text.
      RuntimeError: a rank did not call it in time.

    Example:
      >>> from txcore.launch import preflight
      >>> preflight.check("train_step", {"batch": "float32[128,784]"})  # alone: always the same
    """
    client, world = _compat.coordination_client(), _compat.coordination_size()
    if client is not None and world > 1:
        # Numbered, not named: the comparison itself finds that ranks run programs of other names.
        folder = f"{FOLDER}{next(_calls)}/"
        watch.meet("a comparison of the ranks")
        texts = problem, remedy
        compare_facts(
            client, _compat.coordination_rank(), world, folder, name, facts, timeout_s, texts
        )


def compare_facts(
    client: Any,
    rank: int,
    world: int,
    folder: str,
    name: str,
    facts: Facts,
    timeout_s: float,
    texts: tuple[str, str] = (PROBLEM, REMEDY),
) -> None:
    """Compare as `check` does, in a folder of the coordinator that is used once."""
    own = {title: _split_lines(fact) for title, fact in facts.items()} | {"program": [name]}
    text = json.dumps(own, sort_keys=True)
    client.key_value_set(f"{folder}digest/{rank}", hashlib.sha256(text.encode()).hexdigest())
    digests = _collect_digests(client, name, folder, world, timeout_s)
    if len(set(digests.values())) == 1:
        return
    groups = _group_by_digest(digests)
    if rank in (group[0] for group in groups):
        client.key_value_set(f"{folder}facts/{rank}", text)
    theirs = [
        _read_facts(client, f"{folder}facts/{group[0]}") for group in groups[: MOST_GROUPS + 1]
    ]
    with contextlib.suppress(RuntimeError):  # the coordinator must not end before all have read
        client.wait_at_barrier(f"{folder}read", int(READ_S * 1000))
    if any(their.get("program", [name]) != [name] for their in theirs):
        texts = PROBLEM, REMEDY
    raise MismatchError(describe_difference(groups, theirs, *texts))


def _read_facts(client: Any, key: str) -> dict[str, list[str]]:
    try:
        return json.loads(client.blocking_key_value_get(key, int(READ_S * 1000)))
    except RuntimeError:  # that rank has died
        return {}


def _split_lines(fact: str | Sequence[str]) -> list[str]:
    return fact.splitlines() if isinstance(fact, str) else [str(line) for line in fact]


def _collect_digests(
    client: Any, name: str, folder: str, world: int, timeout_s: float
) -> dict[int, str]:
    """Wait for all ranks, and return the digest of each."""
    late: RuntimeError | None = None
    try:
        client.wait_at_barrier(f"{folder}here", int(timeout_s * 1000))
    except RuntimeError as error:
        late = error
    rows = dict(client.key_value_dir_get(f"{folder}digest/"))
    digests = {r: rows[key] for r in range(world) if (key := f"{folder}digest/{r}") in rows}
    if late is None and len(digests) == world:
        return digests
    why = f"this one came after the others had waited for {timeout_s:g} s"
    if len(digests) < world:
        missing = rank_names(set(range(world)) - digests.keys())
        why = f"{missing} did not come within {timeout_s:g} s"
    raise RuntimeError(
        f"the pre-flight of {name!r} needs every rank, but {why}: see what it did meanwhile, or "
        "raise timeout_s= if it takes longer to load or compile"
    ) from late


def _group_by_digest(digests: Mapping[int, str]) -> list[list[int]]:
    """Return the ranks by digest, the largest group (that of the lowest rank) first."""
    groups: dict[str, list[int]] = {}
    for rank in sorted(digests):
        groups.setdefault(digests[rank], []).append(rank)
    return sorted(groups.values(), key=lambda group: (-len(group), group[0]))


def describe_difference(
    groups: Sequence[Sequence[int]],
    facts: Sequence[Mapping[str, list[str]]],
    problem: str = PROBLEM,
    remedy: str = REMEDY,
) -> str:
    """Return the message about groups of ranks whose facts differ.

    Args:
      groups: the ranks of each group; all are compared with the first.
      facts: each group's facts; may hold those of the first groups only.
      problem, remedy: what is wrong, and what to do about it.

    Returns:
      A text of bounded length.

    Example:
      >>> from txcore.launch.preflight import describe_difference
      >>> print(describe_difference([[0, 2], [1]],
      ...                           [{"batch": ["float32[8,4]"]}, {"batch": ["float32[4,4]"]}]))
      the ranks would run different programs: rank 1 differs from ranks 0 and 2
      batch:
        --- ranks 0 and 2
        +++ rank 1
        -float32[8,4]
        +float32[4,4]
      Nothing was run. Start every rank with the same script, arguments, settings, data and packages
    """
    reference, *others = groups
    differing = sorted(rank for group in others for rank in group)
    differ = "differs" if len(differing) == 1 else "differ"
    rows = [f"{problem}: {rank_names(differing)} {differ} from {rank_names(reference)}"]
    for group, theirs in zip(others, facts[1:], strict=False):
        if len(others) > 1:
            rows.append(f"{rank_names(group)} against {rank_names(reference)}:")
        for title in _titles_to_compare(facts[0], theirs):
            before, after = facts[0].get(title, []), theirs.get(title, [])
            if before != after:
                rows += [f"{title}:", *_diff_lines(before, after, reference, group)]
    if len(groups) > len(facts):
        rows.append(f"({len(groups) - len(facts)} more groups of ranks differ from all these)")
    rows.append(remedy)
    return "\n".join(rows)


def _titles_to_compare(ours: Mapping[str, list[str]], theirs: Mapping[str, list[str]]) -> list[str]:
    """Return the titles to compare: the name alone of two programs with different titles."""
    other_program = theirs and ours.get("program") != theirs.get("program")
    if other_program and ours.keys() != theirs.keys():
        return ["program"]
    return sorted(ours.keys() | theirs.keys())


def _diff_lines(
    before: Sequence[str], after: Sequence[str], reference: Sequence[int], group: Sequence[int]
) -> list[str]:
    """Return the lines that differ, with two of context, as `diff -u` writes them."""
    first = max(0, _count_same_lines(before, after) - 2)
    ends = _count_same_lines(before[first:][::-1], after[first:][::-1]) - 2
    old, new = (lines[first : len(lines) - max(0, ends)] for lines in (before, after))
    cut = slice(MOST_COMPARED)  # difflib takes time by the square of the lines
    changes = list(difflib.unified_diff(old[cut], new[cut], n=2, lineterm=""))[3:]
    rows = [f"--- {rank_names(reference)}", f"+++ {rank_names(group)}"]
    if first:
        rows.append(f"({first} line{' is' if first == 1 else 's are'} the same)")
    rows += ["..." if row.startswith("@@") else row for row in changes[:MOST_LINES]]
    if len(changes) > MOST_LINES or max(len(old), len(new)) > MOST_COMPARED:
        rows.append("(and more)")
    return [f"  {row[:LONGEST_LINE]}" for row in rows]


def _count_same_lines(before: Sequence[str], after: Sequence[str]) -> int:
    """Return the number of lines that two texts have in common at their beginning."""
    pairs = enumerate(zip(before, after, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(before), len(after)))


def facts_of(
    mesh: jax.sharding.Mesh, shapes: Any, collectives: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Return what has to be the same on every rank that runs a program.

    Args:
      mesh: the devices that it runs on.
      shapes: pytree of its arguments (arrays or shapes) with their global shapes.
      collectives: a line for each collective of the compiled program, in its order.

    Returns:
      Lines by title, for `check`.

    Example:
      >>> from txcore.launch import preflight
      >>> mesh = jax.make_mesh((2,), ("data",))
      >>> facts = preflight.facts_of(mesh, {"x": np.zeros((8, 4), np.float32)}, ["psum/loss f32[]"])
      >>> facts["mesh"], facts["shapes"]
      (['data=2', 'device 0 cpu of rank 0', 'device 1 cpu of rank 0'], ["['x'] float32[8,4]"])
    """
    leaves = jax.tree_util.tree_flatten_with_path(shapes)[0]
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return {
        **read_surroundings(),
        "mesh": [axes, *(_describe_device(device) for device in mesh.devices.flat)],
        "shapes": [
            f"{jax.tree_util.keystr(path)} {_describe_shape(leaf)}" for path, leaf in leaves
        ],
        "collectives": list(collectives),
    }


def read_surroundings() -> dict[str, list[str]]:
    """Return what besides its code changes a program's results, and has to be equal on all ranks.

    Returns:
      Versions, jax's settings and compiler flags: lines by title, for `check`.

    Example:
      >>> from txcore.launch import preflight
      >>> list(preflight.read_surroundings())
      ['versions', 'jax settings', 'compiler flags']
    """
    return {
        "versions": read_versions(),
        "jax settings": settings.program_settings(),
        "compiler flags": settings.compiler_flags(),
    }


def read_versions() -> list[str]:
    """Return the versions of Python and of the packages that make a program.

    Example:
      >>> from txcore.launch import preflight
      >>> [line.split()[0] for line in preflight.read_versions()]
      ['python', 'jax', 'jaxlib', 'numpy', 'txcore']
    """
    import jaxlib
    import numpy as np

    packages = [("jax", jax), ("jaxlib", jaxlib), ("numpy", np)]
    rows = [f"{name} {getattr(module, '__version__', 'unknown')}" for name, module in packages]
    return [f"python {platform.python_version()}", *rows, f"txcore {version.VERSION}"]


def _describe_device(device: Any) -> str:
    return f"device {device.id} {device.device_kind} of rank {device.process_index}"


def _describe_shape(leaf: Any) -> str:
    kind = getattr(leaf, "dtype", type(leaf).__name__)
    return f"{kind}[{','.join(map(str, getattr(leaf, 'shape', ())))}]"
