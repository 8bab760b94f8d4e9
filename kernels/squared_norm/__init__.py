"""The sum of an array's squares, from which a norm to clip by is computed.

Imports `_compat`, `kernels.common`, `kernels.dispatch`, `kernels.optimizer`, `varying`.
"""

from txcore.kernels.squared_norm.api import squared_norm

__all__ = ["squared_norm"]
