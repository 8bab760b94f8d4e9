"""Many arrays as one flat buffer, and back."""

from txcore.kernels.bucket.api import pack, unpack

__all__ = ["pack", "unpack"]
