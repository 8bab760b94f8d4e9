"""Softmax cross-entropy with integer labels, of logits or of a linear layer's inputs."""

from txcore.kernels.cross_entropy.api import cross_entropy
from txcore.kernels.cross_entropy.linear_api import linear_cross_entropy

__all__ = ["cross_entropy", "linear_cross_entropy"]
