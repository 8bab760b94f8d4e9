"""Dropout by one random key for each example; the backward pass computes the mask again.

Imports `_compat`, `kernels.common`, `kernels.dispatch`, `varying`.
"""

from txcore.kernels.dropout.api import dropout

__all__ = ["dropout"]
