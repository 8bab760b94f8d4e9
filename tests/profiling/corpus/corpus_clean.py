"""Explicit programs: the collectives that they ask for, their bytes counted by hand."""

from corpus import clean_async as clean_async
from corpus import clean_calls as clean_calls
from corpus import clean_derivatives as clean_derivatives
from corpus import clean_dtypes as clean_dtypes
from corpus import clean_flow as clean_flow
from corpus import clean_lax as clean_lax
from corpus import clean_left_out as clean_left_out
from corpus import clean_models as clean_models
from corpus import clean_trees as clean_trees
from corpus import clean_txcore as clean_txcore
from corpus.corpus_moves import CLEAN as CLEAN
from corpus.corpus_moves import Clean as Clean
