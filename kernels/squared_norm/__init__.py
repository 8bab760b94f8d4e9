"""The sum of an array's squares, from which a norm to clip by is computed.

Imports `kernels.common`, `kernels.dispatch`, `kernels.optimizer`.
"""

from txcore.kernels.squared_norm.api import squared_norm

__all__ = ["squared_norm"]
