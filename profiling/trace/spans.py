"""Sets of intervals as sorted, disjoint (start, end) tuples: their union, parts and length.

Overlap and idle time come from these, never from sums of durations: two events at the same time
are one second of time, not two.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

Span = tuple[int, int]  # nanoseconds, from and to
Spans = tuple[Span, ...]


def unite(spans: Iterable[Span]) -> Spans:
    """Return the union of intervals, sorted and disjoint.

    Example:
      >>> unite([(5, 9), (0, 3), (2, 4), (7, 7)])
      ((0, 4), (5, 9))
    """
    found: list[Span] = []
    for start, end in sorted(spans):
        if end <= start:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return tuple(found)


def intersect(a: Sequence[Span], b: Sequence[Span]) -> Spans:
    """Return what two unions have in common.

    Example:
      >>> intersect(((0, 4), (5, 9)), ((3, 6),))
      ((3, 4), (5, 6))
    """
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        if a[i][1] <= b[j][1]:
            i += 1
        else:
            j += 1
    return tuple(found)


def subtract(a: Sequence[Span], b: Sequence[Span]) -> Spans:
    """Return the part of one union that lies outside another.

    Example:
      >>> subtract(((0, 4), (5, 9)), ((3, 6),))
      ((0, 3), (6, 9))
    """
    found, j = [], 0
    for start, end in a:
        while j < len(b) and b[j][1] <= start:
            j += 1
        k = j
        while k < len(b) and b[k][0] < end:
            if b[k][0] > start:
                found.append((start, b[k][0]))
            start = max(start, b[k][1])
            k += 1
        if start < end:
            found.append((start, end))
    return tuple(found)


def clip(a: Spans, window: Span) -> Spans:
    """Return the part of a union that lies in a window, in time that does not grow with the rest.

    Example:
      >>> clip(((0, 4), (5, 9), (20, 30)), (3, 8))
      ((3, 4), (5, 8))
    """
    first = bisect_right(a, window[0], key=lambda span: span[1])
    last = bisect_left(a, window[1], lo=first, key=lambda span: span[0])
    return tuple((max(s, window[0]), min(e, window[1])) for s, e in a[first:last])


def length(spans: Iterable[Span]) -> int:
    """Return the total length of disjoint intervals.

    Example:
      >>> length(((0, 4), (5, 9)))
      8
    """
    return sum(end - start for start, end in spans)
