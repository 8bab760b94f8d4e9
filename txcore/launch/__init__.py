"""Starting several processes, and what they tell each other before any computation."""

from txcore._compat import backend_started as backend_started
from txcore._compat import simulate_cpu_devices as simulate_cpu_devices
from txcore.launch.cluster import Cluster as Cluster
from txcore.launch.cluster import cluster as cluster
from txcore.launch.initialize import initialize as initialize
from txcore.launch.preflight import MismatchError as MismatchError
from txcore.launch.store import barrier as barrier
from txcore.launch.store import share as share
from txcore.launch.store import world_size as world_size
