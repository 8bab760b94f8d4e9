"""Softmax cross-entropy with integer labels, of logits.

Imports `kernels.common`, `kernels.dispatch`, `varying`.
"""

from txcore.kernels.cross_entropy.api import cross_entropy

__all__ = ["cross_entropy"]
