"""Every example in a docstring of txcore.profiling runs."""

import doctest
import importlib
import pkgutil

import pytest

import txcore.profiling

MODULES = [m.name for m in pkgutil.walk_packages(txcore.profiling.__path__, "txcore.profiling.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert not failed
