"""Matrix product with bias and activation in one op."""

from txcore.kernels.dense.api import dense

__all__ = ["dense"]
