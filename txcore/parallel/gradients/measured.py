"""Which algorithm was measured to be the fastest here: what `txcore bench --record` wrote."""

import math
from collections.abc import Mapping

import jax.numpy as jnp

from txcore import _compat
from txcore.kernels.dispatch import tuned
from txcore.kernels.dispatch.problem import Problem


def problem_of(platform: str, nbytes: int, dtype: str, devices: int, processes: int) -> Problem:
    """Describe a mean of so many bytes of a device, as the tuning file names its class.

    Its key rounds the elements up to a power of two.

    Example:
      >>> from txcore.parallel.gradients.measured import problem_of
      >>> problem_of("cpu", 12_000, "float32", devices=4, processes=2).key
      'pmean|cpu|float32|4096|devices=4,processes=2'
    """
    elements = -(-nbytes // jnp.dtype(dtype).itemsize)
    options = ("devices", devices), ("processes", processes)
    return Problem("pmean", platform, platform, ((elements,),), (dtype,), options)


def find_measured(platform: str, nbytes: int, dtype: str, sizes: Mapping[str, int]) -> str | None:
    """Return the fastest algorithm for a mean in this run; None where nothing is known.

    A size between two that were measured counts as the larger one, up to four times its own. The
    processes of a run need the same tuning file: other algorithms are other programs.

    Args:
      platform: "cpu", "gpu" or "tpu".
      nbytes: of one device's operand.
      dtype: of the operand.
      sizes: of the axes.

    Returns:
      What the file says, which may name an algorithm that cannot run over these axes.

    Raises:
      TuningError: the file cannot be used.
    """
    devices, processes = math.prod(sizes.values()), _compat.coordination_size()
    for size in (nbytes, 2 * nbytes):
        problem = problem_of(platform, size, dtype, devices, processes)
        for _, entry in tuned.find_entries(problem):
            name = entry.config.get("algorithm")
            if isinstance(name, str):
                return name
    return None
