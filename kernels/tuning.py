"""What was measured: which implementation and configuration is the fastest for a class."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from txcore.kernels.problem import Problem


@dataclass(frozen=True)
class Entry:
    """Hold the fastest implementation measured for a class of problems."""

    implementation: Literal["xla", "pallas", "triton"]
    config: Mapping[str, Any] = field(default_factory=dict)
    source: str = "recorded"


def lookup(problem: Problem) -> Iterator[Entry]:
    """Yield what is known of a problem's class, the most specific source first."""
    yield from ()


def config_of(kind: type, entry: Entry) -> Any:
    """Return an entry's configuration as the implementation's own class."""
    return kind(**entry.config)
