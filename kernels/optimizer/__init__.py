"""One update of one array: SGD with momentum, AdamW."""

from txcore.kernels.optimizer.api import adamw, sgd_momentum

__all__ = ["adamw", "sgd_momentum"]
