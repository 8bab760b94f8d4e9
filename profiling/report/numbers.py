"""Write figures as text: bytes, counts, and numbers that are too large to be of use."""

from typing import Any

MOST = 10**18  # bytes and executions; larger numbers are written as "over 10^18"
_OVER = "over 10^18"


def format_count(number: int) -> str:
    """Write a number with its thousands apart, or that it is over 10^18."""
    return f"{number:,}" if number <= MOST else _OVER


def cap_figure(value: Any) -> Any:
    """Return a number as a report shows it: itself, or "over 10^18"."""
    return _OVER if type(value) is int and value > MOST else value


def format_bytes(number: int) -> str:
    """Write a number of bytes with three digits and its decimal unit.

    Example:
      >>> format_bytes(1664300), format_bytes(10**40)
      ('1.66 MB', 'over 10^18 B')
    """
    if number > MOST:
        return f"{_OVER} B"
    size, unit = float(number), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{number} B" if unit == "B" else f"{size:.3g} {unit}"
