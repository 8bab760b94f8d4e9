"""The examples in the docstrings of the data modules run."""

import doctest

import batches
import dataset
import download
import idx
import pytest


@pytest.mark.parametrize("module", [batches, dataset, download, idx], ids=lambda m: m.__name__)
def test_docstrings(module):
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 0
