"""What tests of targets share."""

import pytest

from txcore.profiling.targets import parse_target


def available(name):
    """Return the target's name, or skip where its compiler is not installed."""
    try:
        assert parse_target(name).devices
    except ImportError as error:
        pytest.skip(str(error))
    return name
