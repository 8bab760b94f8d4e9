"""Programs in which the tag lies: what the partitioner added looks as if the user had asked.

Each holds at least one collective that nobody wrote, dressed as one that somebody did: under the
user's tag, under the name of a collective, merged with the user's or standing in for one that the
compiler left out. None may pass.
"""

from corpus import lies_names, lies_places, lies_tags, lies_twins
from corpus.corpus_claims import LIES

__all__ = ["LIES", "lies_names", "lies_places", "lies_tags", "lies_twins"]
