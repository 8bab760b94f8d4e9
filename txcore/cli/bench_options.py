"""What `txcore bench` is asked for: its options, read and checked."""

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from txcore.cli.errors import BadUsage
from txcore.cli.load import parse_axes, parse_devices, parse_path, parse_positive

NAMES = (
    *("psum", "pmean", "pmax", "all_gather", "reduce_scatter", "all_to_all", "ppermute"),
    "broadcast",
)
DTYPES = (
    *("float32", "bfloat16", "float16", "float64"),
    *("int8", "uint8", "int32", "uint32", "int64"),
)
_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _parse_names(text: str) -> tuple[str, ...]:
    """Read names with commas between them."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"needs names, each once, as a,b, but got {text[:80]!r}")
    return names


def parse_size(text: str) -> int:
    """Return the bytes of a size as nccl-tests writes it: 4096, 4K, 256M, 1G."""
    digits = text.upper().rstrip("BKMG")
    unit = text.upper()[len(digits) :]
    unit = unit.removesuffix("B") if len(unit) == 2 else unit
    if not (digits.isdecimal() and len(digits) <= 18 and unit in _UNITS and int(digits)):
        raise argparse.ArgumentTypeError(
            f"needs a size of at least 1 byte, as 4096, 4K, 256M or 1G, but got {text[:80]!r}"
        )
    return int(digits) * _UNITS[unit]


def _parse_factor(text: str) -> int:
    if (factor := parse_positive(text)) < 2:
        raise argparse.ArgumentTypeError(f"needs at least 2, but got {factor}")
    return factor


def _parse_count(text: str) -> int:
    return 0 if text == "0" else parse_positive(text)


OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "operations": {
        "nargs": "*",
        "metavar": "COLLECTIVE",
        "help": f"{', '.join(NAMES)}, or all (default psum)",
    },
    "--algorithm": {
        "type": _parse_names,
        "metavar": "NAME,...",
        "help": "make the mean as tx.DP(algorithm=) does: plain, chunked, ring, ..., or all",
    },
    "--devices": {
        "type": parse_devices,
        "metavar": "N",
        "help": "simulate N CPU devices a process",
    },
    "--mesh": {
        "type": parse_axes,
        "metavar": "data=2,model=2",
        "help": "the mesh's axes (default data=all devices)",
    },
    "--axis": {
        "type": _parse_names,
        "metavar": "NAME,...",
        "help": "the axes to communicate over, where other axes make several groups at once "
        "(default: the mesh's first)",
    },
    "--min-size": {"type": parse_size, "default": "4K", "metavar": "4K", "help": "default 4K"},
    "--max-size": {
        "type": parse_size,
        "default": "256M",
        "metavar": "256M",
        "help": "default 256M",
    },
    "--factor": {
        "type": _parse_factor,
        "default": 4,
        "metavar": "F",
        "help": "from one size to the next (default 4)",
    },
    "--dtype": {
        "type": _parse_names,
        "default": "float32",
        "metavar": "NAME,...",
        "help": f"of {', '.join(DTYPES)} (default float32)",
    },
    "--warmup": {
        "type": _parse_count,
        "default": 5,
        "metavar": "N",
        "help": "calls before those that count (default 5)",
    },
    "--iterations": {
        "type": parse_positive,
        "default": 20,
        "metavar": "N",
        "help": "calls that count (default 20)",
    },
    "--out-of-place": {
        "action": "store_true",
        "help": "a new array for each result (default: in the operand's place, where it is as "
        "large)",
    },
    "--json": {"type": parse_path, "metavar": "FILE", "help": "write all that was measured, too"},
    "--csv": {"type": parse_path, "metavar": "FILE", "help": "write the table, too"},
    "--plot": {
        "type": parse_path,
        "metavar": "FILE",
        "help": "draw bandwidth over size (.png, .svg)",
    },
    "--record": {
        "action": "store_true",
        "help": "write the fastest algorithm of each size to the tuning file ($TXCORE_TUNING), "
        "where tx.DP(algorithm=None) finds it",
    },
}


def select_names(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the names of the collectives to measure.

    Raises:
      BadUsage: no collective has such a name, or `--algorithm` comes without the mean.
    """
    default = "psum" if options.algorithm is None else "pmean"
    named = tuple(dict.fromkeys(options.operations)) or (default,)
    for name in named:
        if name not in (*NAMES, "all"):
            raise BadUsage(f"bench needs collectives among {', '.join(NAMES)}, all; got {name!r}")
    names = NAMES if "all" in named else named
    if options.algorithm is not None and "pmean" not in names:
        raise BadUsage(
            f"--algorithm is for pmean, the mean of gradients, but got {', '.join(names)}: name "
            "pmean, or leave one of the two out"
        )
    return names


def check_dtypes(options: argparse.Namespace) -> None:
    """Refuse dtypes that cannot be measured, or not with `--algorithm`."""
    for name in options.dtype:
        if name not in DTYPES:
            raise BadUsage(f"--dtype needs names among {', '.join(DTYPES)}, but got {name!r}")
        if options.algorithm is not None and "int" in name:
            raise BadUsage(f"--algorithm averages floats, but got --dtype {name}: leave one out")


def walk_sizes(options: argparse.Namespace) -> Iterator[int]:
    """Yield --min-size, times --factor as often as it stays within --max-size."""
    size = options.min_size
    if size > options.max_size:
        raise BadUsage(
            f"--max-size needs at least --min-size, {size} bytes, but got {options.max_size}"
        )
    while size <= options.max_size:
        yield size
        size *= options.factor
