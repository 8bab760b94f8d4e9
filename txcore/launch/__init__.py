"""Start several processes, join them, and compare what they are about to run.

Imports `_compat`, `later`, `launch.join`, `launch.watch`, `version`.
"""

from typing import TYPE_CHECKING

from txcore._compat import backend_started as backend_started
from txcore._compat import simulate_cpu_devices as simulate_cpu_devices
from txcore.later import import_later
from txcore.launch.key_value import barrier as barrier
from txcore.launch.key_value import share as share
from txcore.launch.key_value import world_size as world_size
from txcore.launch.preflight import MismatchError as MismatchError

if TYPE_CHECKING:
    from txcore.launch.join.cluster import Cluster as Cluster
    from txcore.launch.join.cluster import cluster as cluster
    from txcore.launch.join.initialize import initialize as initialize

__getattr__ = import_later(
    __name__,
    {
        "Cluster": "txcore.launch.join.cluster",
        "cluster": "txcore.launch.join.cluster",
        "initialize": "txcore.launch.join.initialize",
    },
)
