"""Pipeline parallelism in one SPMD program: schedules as data, and what runs them.

Imports `_compat`, `collectives`, `kernels.common`, `parallel`, `parallel.zero`,
`profiling.declared`, `step_scope`, `varying`.
"""

from txcore.parallel.pipeline.layers import split_layers as split_layers
from txcore.parallel.pipeline.making import make_schedule as make_schedule
from txcore.parallel.pipeline.run import evaluate as evaluate
from txcore.parallel.pipeline.run import value_and_grad as value_and_grad
from txcore.parallel.pipeline.schedule import Schedule as Schedule
