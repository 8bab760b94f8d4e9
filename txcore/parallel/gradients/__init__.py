"""The exchange of gradients over the data axes: in which pieces, by which algorithm and dtype.

Imports `_compat`, `collectives`, `kept`, `kernels`, `kernels.common`, `kernels.dispatch`,
`kernels.ring`, `layout`, `parallel`, `parallel.gradients.algorithms`,
`parallel.gradients.compression`, `step_scope`.
"""

from txcore.parallel.gradients import compression as compression
from txcore.parallel.gradients.buckets import Buckets as Buckets
from txcore.parallel.gradients.sync import sync_gradients as sync_gradients
