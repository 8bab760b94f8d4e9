"""A linear layer and its softmax cross-entropy in one op, which never holds all logits.

Imports `kernels.common`, `kernels.cross_entropy`, `kernels.dispatch`, `varying`.
"""

from txcore.kernels.linear_cross_entropy.api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
