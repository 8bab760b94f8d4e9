"""Measure collectives: time and bandwidth by size, the results held to NumPy in the same run.

Imports `collectives`, `kernels.dispatch`, `launch.gloo_threads`, `outside`, `parallel.gradients`,
`parallel.gradients.algorithms`, `profiling.bandwidth`, `version`.
"""

from txcore.bench.measure import Row as Row
from txcore.bench.measure import Setup as Setup
from txcore.bench.measure import measure_size as measure_size
from txcore.bench.operations import OPERATIONS as OPERATIONS
from txcore.bench.operations import Operation as Operation
from txcore.bench.operations import algorithms_for as algorithms_for
from txcore.bench.operations import mean_by as mean_by
from txcore.bench.record import record_fastest as record_fastest
