"""Tensor parallelism: layers of which each device holds a part, as Megatron-LM splits them.

Imports `_compat`, `collectives`, `kernels`, `kernels.common`, `kernels.conv`, `kernels.ring`,
`step_scope`, `tags`, `varying`.
"""

from txcore.parallel.tensor.conv import column_conv as column_conv
from txcore.parallel.tensor.conv import row_conv as row_conv
from txcore.parallel.tensor.dense import column_dense as column_dense
from txcore.parallel.tensor.dense import row_dense as row_dense
from txcore.parallel.tensor.heads import check_heads as check_heads
from txcore.parallel.tensor.pair import enter as enter
from txcore.parallel.tensor.pair import leave as leave
from txcore.parallel.tensor.vocabulary import cross_entropy as cross_entropy
from txcore.parallel.tensor.vocabulary import embedding as embedding
