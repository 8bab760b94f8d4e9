"""Sharded state (ZeRO, FSDP): each device keeps its part, and gathers what it needs.

Imports `_compat`, `collectives`, `kernels.dispatch`, `layout`, `optim`, `parallel`,
`parallel.gradients`, `step_scope`.
"""

from txcore.parallel.zero.layers import call_with_views as call_with_views
from txcore.parallel.zero.layers import layer as layer
from txcore.parallel.zero.layers import layers as layers
from txcore.parallel.zero.parts import update as update
from txcore.parallel.zero.shard import Shard as Shard
from txcore.parallel.zero.shard import as_shards as as_shards
from txcore.parallel.zero.shard import as_views as as_views
from txcore.parallel.zero.shard import find_views as find_views
from txcore.parallel.zero.shard import gather as gather
from txcore.parallel.zero.shard import is_shard as is_shard
from txcore.parallel.zero.shard import parts_of as parts_of
from txcore.parallel.zero.shard import scatter_early as scatter_early
from txcore.parallel.zero.shard import yet_to_reduce as yet_to_reduce
