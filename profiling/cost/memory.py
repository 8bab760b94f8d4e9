"""Read from the compiler how much of a device's memory a program needs."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      arguments: of the program's arguments.
      results: of its results, donated memory included.
      reused: of the results that take the place of donated arguments.
      temporaries: of arrays that live only while it runs.
      code: of the program itself; 0 where the platform does not report it.
      peak: the most at one time: the larger of the compiler's estimate and the sum of all without
        the reused bytes (XLA for CPU leaves temporaries out of its estimate).
    """

    arguments: int
    results: int
    reused: int
    temporaries: int
    code: int
    peak: int


def memory_of(compiled: jax.stages.Compiled) -> Memory | None:
    """Read the compiler's figures of the memory that its program needs.

    Args:
      compiled: the program.

    Returns:
      The bytes on one device, or None where the platform has no such figures.

    Example:
      >>> found = memory_of(jax.jit(lambda x: x + 1).lower(jnp.ones(1000)).compile())
      >>> found.arguments, found.results
      (4000, 4000)
    """
    said = compiled.memory_analysis()
    if said is None:
        return None

    def read_size(name: str) -> int:
        return int(getattr(said, f"{name}_in_bytes", 0) or 0)

    arguments, results, reused = (
        read_size("argument_size"),
        read_size("output_size"),
        read_size("alias_size"),
    )
    temporaries, code = read_size("temp_size"), read_size("generated_code_size")
    whole = arguments + results - reused + temporaries + code
    return Memory(
        arguments, results, reused, temporaries, code, max(read_size("peak_memory"), whole)
    )
