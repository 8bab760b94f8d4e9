"""Ranks of the watch with a coordinator in memory and a clock that is set by hand."""

import pytest
from watch_fakes import Clock, Coordinator

from txcore.launch.watch.watcher import Watcher


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def coordinator():
    return Coordinator()


@pytest.fixture
def ranks(coordinator, clock):
    """Three ranks."""
    return [Watcher(coordinator, rank, 3, clock=clock) for rank in range(3)]
