"""Optimizers, schedules and gradient clipping, on the fused kernels.

Imports `_compat`, `collectives`, `kernels`, `kernels.common`, `layout`, `path_rules`, `printing`,
`step_scope`, `trees`, `varying`.
"""

from txcore.optim.adamw import adamw as adamw
from txcore.optim.clipping import clip_by_global_norm as clip_by_global_norm
from txcore.optim.clipping import global_norm as global_norm
from txcore.optim.from_optax import as_optimizer as as_optimizer
from txcore.optim.from_optax import from_optax as from_optax
from txcore.optim.groups import groups as groups
from txcore.optim.muon import muon as muon
from txcore.optim.optimizer import Optimizer as Optimizer
from txcore.optim.schedules import Schedule as Schedule
from txcore.optim.schedules import constant as constant
from txcore.optim.schedules import cosine as cosine
from txcore.optim.schedules import linear_scaling as linear_scaling
from txcore.optim.schedules import warmup as warmup
from txcore.optim.sgd import sgd as sgd
