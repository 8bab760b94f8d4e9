"""Dropout by one random key an example, its mask computed anew in the backward pass.

Imports `_compat`, `kernels.common`, `kernels.dispatch`, `varying`.
"""

from txcore.kernels.dropout.api import dropout

__all__ = ["dropout"]
