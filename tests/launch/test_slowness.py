"""The bounds of the tests on wall-clock times: firm on an idle machine, wider on a busy one."""

import machine
import pytest


@pytest.mark.parametrize("slowness, is_within", [(1.0, False), (3.0, True)])
def test_a_busy_machine_stretches_a_bound(slowness, is_within, monkeypatch):
    monkeypatch.setattr(machine, "measure_slowness", lambda: slowness)
    assert machine.within(40.65, 40) is is_within


def test_within_the_bound_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(machine, "measure_slowness", None)
    assert machine.within(39, 40)


def test_the_processes_that_wait_count(monkeypatch):
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (80.0, 0.0, 0.0))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    assert machine.measure_slowness() >= 40
