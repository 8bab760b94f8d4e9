"""Compressions by their names."""

from collections.abc import Callable
from typing import Any

from txcore.parallel.gradients.compression.quantized import bf16, fp16, int8
from txcore.parallel.gradients.compression.record import Compression

NAMED: dict[str, Callable[[], Compression]] = {"bf16": bf16, "fp16": fp16, "int8": int8}


def as_compression(op: str, given: Any) -> Compression | None:
    """Return the compression that `compression=` of `op` stands for; None for none.

    Raises:
      ValueError: it is another name.
      TypeError: it is no name and no compression.
    """
    if given is None or isinstance(given, Compression):
        return given
    choice = (
        f"{', '.join(map(repr, NAMED))}, tx.compression.powersgd(rank=...), "
        "tx.compression.top_k(fraction=...) or a tx.compression.Compression"
    )
    if isinstance(given, str):
        if given in NAMED:
            return NAMED[given]()
        raise ValueError(f"{op} needs compression= {choice}, got {given!r}")
    hint = ": call it" if callable(given) else ""
    raise TypeError(f"{op} needs compression= {choice}, got {given!r}{hint}")
