"""The examples in the docstrings of the data modules run."""

import doctest

import agreement
import pytest
from data import batches, dataset, download, feed, files, idx, npz

MODULES = [agreement, batches, dataset, download, feed, files, idx, npz]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_docstrings(module):
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 0
