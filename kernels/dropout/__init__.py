"""Dropout by one random key an example, its mask computed anew in the backward pass."""

from txcore.kernels.dropout.api import dropout

__all__ = ["dropout"]
