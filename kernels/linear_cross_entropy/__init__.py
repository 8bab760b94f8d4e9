"""Softmax cross-entropy of a linear layer's inputs, without its logits as a whole.

Imports `kernels.common`, `kernels.cross_entropy`, `kernels.dispatch`, `varying`.
"""

from txcore.kernels.linear_cross_entropy.api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
