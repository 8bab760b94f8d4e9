"""Parallel training: what data, tensor and pipeline parallelism do with values and gradients.

Imports `_compat`, `collectives`, `kept`, `kernels.common`, `layout`, `optim`, `parallel.zero`,
`step_scope`, `varying`.
"""

from txcore.parallel.data import example_mean as example_mean
from txcore.parallel.differentiate import grad as grad
from txcore.parallel.differentiate import value_and_grad as value_and_grad
from txcore.parallel.moments import batch_moments as batch_moments
