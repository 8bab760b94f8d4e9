"""Context parallelism: attention over a sequence of which each device holds a part.

Imports `collectives`, `kernels.common`, `kernels.dispatch`, `parallel.zero`, `varying`.
"""

from txcore.parallel.context.chunks import merge_chunks as merge_chunks
from txcore.parallel.context.chunks import positions as positions
from txcore.parallel.context.chunks import split_chunks as split_chunks
from txcore.parallel.context.chunks import token_keys as token_keys
from txcore.parallel.context.ring import ring_attention as ring_attention
