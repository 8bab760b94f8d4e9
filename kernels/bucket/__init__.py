"""Many arrays as one flat buffer, and back.

Imports `_compat`, `kernels.common`, `kernels.dispatch`, `varying`.
"""

from txcore.kernels.bucket.api import pack, unpack

__all__ = ["pack", "unpack"]
