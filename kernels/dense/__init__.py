"""Matrix product with bias and activation in one op.

Imports `kernels.common`, `kernels.dispatch`, `kernels.dropout`, `varying`.
"""

from txcore.kernels.dense.api import dense

__all__ = ["dense"]
