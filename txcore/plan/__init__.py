"""Plans: what is parallel over which mesh axis.

Imports `collectives`, `kernels.common`, `layout`, `mesh`, `path_rules`, `printing`.
"""

from txcore.plan.plan import DP as DP
from txcore.plan.plan import Plan as Plan
from txcore.plan.plan import Predicted as Predicted
