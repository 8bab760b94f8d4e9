"""One update of one array, by SGD with momentum or by AdamW.

Imports `kernels.common`, `kernels.dispatch`, `varying`.
"""

from txcore.kernels.optimizer.api import adamw, sgd_momentum

__all__ = ["adamw", "sgd_momentum"]
