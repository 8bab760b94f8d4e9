"""Convolution with bias, ReLU and max-pooling in one op.

Imports `_compat`, `kernels.common`, `kernels.dispatch`, `varying`.
"""

from txcore.kernels.conv.api import conv2d

__all__ = ["conv2d"]
