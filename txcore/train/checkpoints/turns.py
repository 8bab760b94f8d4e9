"""Call functions on the processes of a run so that all of them return or raise alike."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax

from txcore.launch.key_value import agree_on_problem, share
from txcore.train.checkpoints import folder
from txcore.train.checkpoints.manifest import CheckpointError


class Turns:
    """Number the calls that all processes make together, in the same order.

    Args:
      name: the same on every process, and different for each object.
    """

    def __init__(self, name: str) -> None:
        self._name, self._turns = name, itertools.count()

    def run_on_first(self, function: Callable[[], Any]) -> Any:
        """Call a function on process 0; return its result, or raise its error, on every process."""
        answer: dict[str, Any] = {}
        failed: Exception | None = None
        if jax.process_index() == 0:
            try:
                answer = {"result": function()}
            except Exception as error:  # the others must not wait for it
                failed, answer = error, {"error": _describe_error(error)}
        text = share(f"{self._name}/{next(self._turns)}", json.dumps(answer))
        answer = json.loads(text)
        if "error" in answer:
            raise CheckpointError(answer["error"], every_rank=True) from failed
        return answer["result"]

    def run_on_all(self, function: Callable[[], Any]) -> Any:
        """Call a function on every process; return its result, or raise on all if one fails."""
        result, failed, problem = None, None, None
        try:
            result = function()
        except Exception as error:  # the others must not wait for this process
            failed, problem = error, _describe_error(error)
        problem = agree_on_problem(f"{self._name}/{next(self._turns)}", problem)
        if problem is None:
            return result
        raise CheckpointError(problem, every_rank=True) from failed


def _describe_error(error: Exception) -> str:
    """Return the text of an error for the other processes."""
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{type(error).__name__}: {folder.describe_error(error)}"
