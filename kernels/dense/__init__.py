"""Matrix product with bias, activation and dropout in one op.

Imports `_compat`, `kernels.common`, `kernels.dispatch`, `kernels.dropout`, `varying`.
"""

from txcore.kernels.dense.api import dense

__all__ = ["dense"]
