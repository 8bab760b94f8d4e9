"""Check that all ranks of a run agree on its loop and on its first state."""

import itertools
import operator
import os
from collections.abc import Sequence, Sized
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from txcore.launch import preflight
from txcore.launch.key_value import agree_on_problem
from txcore.launch.watch.status import MismatchError
from txcore.train.options import Options
from txcore.train.replicas import digests
from txcore.train.state.state import TrainState

if TYPE_CHECKING:
    from txcore.train.checkpoints.checkpoints import Checkpoints
    from txcore.train.checkpoints.manifest import Position

COMPILED_S = 1800.0  # for all ranks to compile what they are about to run
ALIKE_S = 5.0  # for all ranks to fail, if they fail alike

_failures = itertools.count()  # those of this process that were asked about

_SAME_STATE = (
    "Nothing was run. Make the same state on every rank (by the same seed, files and numbers), or "
    "send one rank's to all: engine.create_state(params, broadcast_from=0)"
)
_SAME_DATA = (
    "That step was not run. Give the same values on every rank to a leaf that Plan(batch=) does "
    "not split over them: make it by the same seed, files and numbers"
)
_SAME_LOOP = (
    "Nothing was run. Call fit with the same arguments, data and engine on every rank (loggers may "
    "differ)"
)
_CAUSES = (
    "What writes into one copy alone, a step whose result depends on its device, or damaged memory "
    "does that. Go on from a checkpoint of the time before, and see engine.audit and "
    "tx.testing.assert_plans_agree"
)


def check_fit(
    options: Options,
    data: Any,
    *,
    evaluate: Any,
    checkpoints: "Checkpoints | None",
    **counts: int | None,
) -> None:
    """Refuse to start a loop that differs on some rank; every process has to call it.

    Args:
      options: those of the engine that runs the steps.
      data: the batches; their number is compared if it is known.
      evaluate: only whether it is given is compared.
      checkpoints: where and how often the run is saved.
      **counts: the other arguments of `fit`.

    Raises:
      MismatchError: an argument or a setting that changes results differs; every rank raises it,
        and the text names it.
    """
    number = count_batches(data)
    lines = [f"{name}={count}" for name, count in counts.items()]
    lines.append(f"evaluate={'given' if evaluate is not None else None}")
    lines.append(f"batches in data: {'not known' if number is None else number}")
    if checkpoints is None:
        lines.append("checkpoints=None")
    else:
        settings = ("every", "keep", "keep_best", "resume")
        lines += [f"checkpoints.{name}={getattr(checkpoints, name)}" for name in settings]
        lines.append(f"checkpoints.directory={os.path.realpath(checkpoints.directory)}")
    preflight.check("fit", preflight.read_surroundings())
    preflight.check(
        "fit",
        {"arguments of fit": lines, "engine": describe_engine(options)},
        problem="the ranks would run different loops",
        remedy=_SAME_LOOP,
    )


def count_batches(data: Any) -> int | None:
    """Return how many batches an epoch has, None if the data has no length."""
    if not isinstance(data, Sized):
        return None
    try:
        return len(data)
    except (TypeError, NotImplementedError):  # a loader that has a length for some datasets alone
        return None


def check_end(position: "Position") -> None:
    """Refuse a loop that has differed on some rank; every process has to call it.

    Args:
      position: where it ended.

    Raises:
      MismatchError: the ranks ended at different batches, since their data differ in length.
    """
    names = ("steps", "epoch", "batch", "rows")
    preflight.check(
        "the end of fit",
        {"position": [f"{name}={getattr(position, name)}" for name in names]},
        problem="the ranks have run different loops",
        remedy=(
            "An epoch has to have as many batches on every rank: give all the same number, by "
            "tx.even_batches, or data that never end. What was trained was trained on other parts "
            "of the data than meant"
        ),
    )


def describe_engine(options: Options) -> list[str]:
    """Describe the options of an engine that have to be the same on every rank, a line each."""
    update = options.optimizer.update
    kind = f"{update.__module__}.{update.__qualname__.partition('.')[0]}"
    return [
        f"mesh={options.mesh!r}",
        f"plan={options.plan}",
        f"optimizer={kind}",
        f"precision={options.precision}",
        f"on_nonfinite={options.on_nonfinite}",
        f"compiler_options={sorted(options.xla_options.items())}",
    ]


def check_beginning(options: Options, state: TrainState, name: str, batch: Any = None) -> None:
    """Refuse a state that is not the same on every rank; every process has to call it.

    Args:
      options: those of the engine that made the state.
      state: the state before step `name`; it is not donated.
      name: what is about to run.
      batch: what it runs on, on the mesh, if that is known: see `check_batch`.

    Raises:
      MismatchError: the engines differ, or a leaf differs in path, dtype, shape or any bit; every
        rank raises it, and the text names the leaf and the ranks.
    """
    preflight.check(
        f"the state for {name}",
        {
            "state": digests.describe_leaves(state.arrays),
            "leaves in parts": state.given,
            "engine": describe_engine(options),
        },
        timeout_s=COMPILED_S,
        problem="the ranks would begin with different states",
        remedy=_SAME_STATE,
    )
    if found := digests.find_differences(state.arrays, options.mesh.mesh):
        head = f"the ranks would begin {name} with different states (compared bit for bit):"
        raise MismatchError(_format_differences(head, found, _SAME_STATE))
    check_batch(batch, options.mesh.mesh, name)


def check_batch(batch: Any, mesh: Mesh, name: str) -> None:
    """Refuse a batch whose copies on several ranks differ; every process has to call it.

    Args:
      batch: pytree of arrays on the mesh. Leaves without copies on several ranks (examples) are
        not compared, and cost nothing.
      mesh: its devices.
      name: what is about to run.

    Raises:
      MismatchError: copies differ in any bit; every rank raises it, and the text names the leaf and
        the ranks.
    """
    leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
    shared = {
        f"batch{jax.tree_util.keystr(path)}": leaf
        for path, leaf in leaves
        if digests.lies_on_several_ranks(leaf)
    }
    if shared and (found := digests.find_differences(shared, mesh)):
        head = f"the ranks would run {name} on different data (compared bit for bit):"
        raise MismatchError(_format_differences(head, found, _SAME_DATA))


def fails_alike(error: BaseException, steps: int) -> bool:
    """Tell whether every rank fails by the same kind of error; each that fails has to call it.

    Args:
      error: the one that an evaluation raised on this rank.
      steps: the number of steps before it.
    """
    kind = f"{type(error).__name__} after {steps} steps"
    try:
        return agree_on_problem(f"failures/{next(_failures)}", kind, timeout_s=ALIKE_S) == kind
    except RuntimeError:  # rank 0 has not failed
        return False


def check_copies(state: TrainState, mesh: Mesh, after: int | None, since: int | None) -> None:
    """Raise an error if copies of a leaf differ.

    Args:
      state: the state.
      mesh: where it lies.
      after: the number of steps made, if known.
      since: the number of steps after which the copies were last equal, if known.

    Raises:
      MismatchError: copies differ; names leaf, devices and ranks, on every rank alike.
    """
    if found := digests.find_differences(state.arrays, mesh):
        when = "" if after is None else f" after step {after}"
        before = "" if since is None else f"; after step {since} they were equal"
        head = f"copies of the state that have to be equal bit for bit differ{when}{before}:"
        raise MismatchError(_format_differences(head, found, _CAUSES))


def _format_differences(head: str, found: Sequence[digests.Difference], remedy: str) -> str:
    rows = [f"  {difference}" for difference in found]
    if len(found) == digests.MOST_LEAVES:
        rows.append("  (and maybe more)")
    return "\n".join([head, *rows, remedy])


def check_broadcast(root: int, arrays: Any) -> None:
    """Refuse to send a state between ranks whose leaves differ; every process has to call it."""
    preflight.check(
        "create_state",
        {"state": digests.describe_leaves(arrays), "create_state": f"broadcast_from={root}"},
        problem="one rank's state does not fit the others",
        remedy=(
            "Nothing was sent. create_state(broadcast_from=) needs the same leaves on every rank, "
            "of any values: give it the same structure, dtypes and shapes"
        ),
    )


def check_rank(op: str, option: str, rank: Any) -> int:
    """Return a rank of this run; refuse any other value."""
    size = jax.process_count()
    try:
        number = operator.index(rank)
    except TypeError:
        number = -1
    if isinstance(rank, bool) or not 0 <= number < size:
        raise ValueError(f"{op} needs {option}= a rank from 0 to {size - 1}, got {rank!r}")
    return number


# A state that a step returned is equal on all ranks if the one before was. It is known by its
# fields, since `replace` and tree functions put others in their place.


def note_equal(state: TrainState) -> None:
    """Note that a state is equal on all ranks."""
    vars(state)["known_equal"] = state.returned or state.arrays


def forget_equal(state: TrainState) -> None:
    """Have a state compared before its next step."""
    vars(state)["known_equal"] = None


def is_equal(state: TrainState) -> bool:
    """Tell whether a state is known to be equal on all ranks."""
    known = state.known_equal or {}
    return all(known.get(name) is tree for name, tree in state.arrays.items())
