"""Plans: what is parallel over which mesh axis.

Imports `collectives`, `kernels.common`, `layout`, `mesh`, `optim`, `parallel`,
`parallel.gradients`, `parallel.gradients.algorithms`, `parallel.gradients.compression`,
`parallel.pipeline`, `path_rules`, `printing`, `profiling.report`.
"""

from txcore.plan.data_parallel import DP as DP
from txcore.plan.pipeline_parallel import PP as PP
from txcore.plan.plan import Plan as Plan
from txcore.plan.tensor_parallel import TP as TP
