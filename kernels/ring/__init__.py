"""Collectives round a ring of TPUs by remote DMA, and products that overlap with them.

Those without a product run on GPUs too, by the switch of their node.

Imports `_compat`, `kernels.dispatch`, `varying`.
"""

from txcore.kernels.ring.api import ring_all_gather as ring_all_gather
from txcore.kernels.ring.api import ring_all_reduce as ring_all_reduce
from txcore.kernels.ring.api import ring_reduce_scatter as ring_reduce_scatter
from txcore.kernels.ring.blocks import count_laid as count_laid
from txcore.kernels.ring.call import check_platform as check_platform
from txcore.kernels.ring.matmul import ring_all_gather_matmul as ring_all_gather_matmul
from txcore.kernels.ring.matmul import ring_matmul_reduce_scatter as ring_matmul_reduce_scatter
