"""What an audit has to say about a program of the corpus, on any machine."""

from collections import Counter

from corpus.corpus_added import Added
from corpus.corpus_clean import Clean
from corpus.corpus_programs import Program

from txcore.profiling import Report


def check_added(program: Added, report: Report, platform: str) -> None:
    """Require that what was added is flagged, with its class and its line."""
    assert report.checked
    assert not report.exact or program.origin == "reshard"
    rows = [c for c in report.collectives if c.origin in (program.origin, *_FLAGGED)]
    if program.origin in _FLAGGED:
        assert report.unexplained
        assert not report.missing
        rows = list(report.unexplained)
    else:
        assert report.ok
    if not program.limit(platform):
        assert {c.origin for c in rows} == {program.origin}
        assert rows
        assert {c.source for c in rows} <= program.marked()


def check_clean(program: Clean, report: Report, platform: str) -> None:
    """Require that nothing is flagged, and that kinds, axes and bytes are those counted by hand."""
    assert report.checked
    assert report.ok, str(report)
    assert report.exact == program.exact
    moves = program.moves_on(platform)
    wanted = _bytes((m.kind, frozenset(m.axes), m.payload * m.trips) for m in moves)
    found = ((c.kind, frozenset(c.axes), c.payload_bytes * c.trips) for c in report.collectives)
    assert _bytes(found) == wanted
    assert report.payload_bytes == sum(m.payload * m.trips for m in moves)
    dtypes = {dtype for c in report.collectives for dtype in c.dtype.split(",")}
    assert dtypes == {m.dtype for m in moves}
    places = {part.source for c in report.collectives for part in c.parts}
    assert places <= set(program.span())
    assert bool(places) == bool(moves)
    for c in report.collectives:
        assert sum(part.payload_bytes for part in c.parts) == c.payload_bytes
    assert all(fate.fates and "missing" not in fate.fates for fate in report.fates)


def check_lie(program: Program, report: Report, platform: str) -> None:
    """Require that the program does not pass, and that the line to blame is named."""
    assert report.checked
    assert not report.ok
    assert report.unexplained
    if not program.limit(platform):
        assert {c.source for c in report.unexplained} <= program.marked()


_FLAGGED = ("partitioner", "boundary")


def _bytes(rows) -> Counter:
    total: Counter = Counter()
    for kind, axes, payload in rows:
        total[kind, axes] += payload
    return total
