"""Programs in which communication gets in unasked. The line that causes it is marked."""

from corpus import added_dots, added_edges, added_moves
from corpus.corpus_marks import ADDED, Added

__all__ = ["ADDED", "Added", "added_dots", "added_edges", "added_moves"]
