"""One update of one array, by SGD with momentum or AdamW, and the norm to clip by."""

from txcore.kernels.optimizer.api import adamw, sgd_momentum
from txcore.kernels.optimizer.norm import squared_norm

__all__ = ["adamw", "sgd_momentum", "squared_norm"]
