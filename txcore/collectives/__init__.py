"""Collectives on pytrees inside `shard_map`: checked, tagged, with their transposes stated.

Imports `_compat`, `kernels.ring`, `step_scope`, `tags`, `varying`.
"""

from txcore.collectives.all_gather import all_gather as all_gather
from txcore.collectives.all_to_all import all_to_all as all_to_all
from txcore.collectives.axis import axis_index as axis_index
from txcore.collectives.axis import axis_size as axis_size
from txcore.collectives.broadcast import broadcast as broadcast
from txcore.collectives.pmax import pmax as pmax
from txcore.collectives.pmax import pmin as pmin
from txcore.collectives.ppermute import ppermute as ppermute
from txcore.collectives.ppermute import shift as shift
from txcore.collectives.psum import pmean as pmean
from txcore.collectives.psum import psum as psum
from txcore.collectives.reduce_scatter import psum_scatter as psum_scatter
from txcore.collectives.reduce_scatter import reduce_scatter as reduce_scatter
from txcore.collectives.vary import pvary as pvary
from txcore.collectives.vary import vary as vary
