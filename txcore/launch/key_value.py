"""Words between processes, through the coordinator: no backend, no collective."""

from txcore import _compat
from txcore.launch import watch


def world_size() -> int:
    """Return the number of processes of the run, without starting a backend.

    Example:
      >>> from txcore import launch
      >>> launch.world_size()
      1
    """
    return _compat.coordination_size()


def barrier(name: str, *, timeout_s: float = 1800.0) -> None:
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


def share(name: str, value: str, *, timeout_s: float = 1800.0) -> str:
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
