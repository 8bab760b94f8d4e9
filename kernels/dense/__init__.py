"""Matrix product with bias, activation and dropout in one op.

Imports `kernels.common`, `kernels.dispatch`, `kernels.dropout`, `varying`.
"""

from txcore.kernels.dense.api import dense

__all__ = ["dense"]
