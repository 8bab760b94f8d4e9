"""The exchange of gradients over the data axes: in which pieces, by which algorithm and dtype.

Imports `collectives`, `kept`, `kernels.common`, `layout`.
"""

from txcore.parallel.gradients.sync import sync_gradients as sync_gradients
