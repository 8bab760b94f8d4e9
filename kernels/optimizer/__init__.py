"""One update of one array, by SGD with momentum or AdamW."""

from txcore.kernels.optimizer.api import adamw, sgd_momentum

__all__ = ["adamw", "sgd_momentum"]
