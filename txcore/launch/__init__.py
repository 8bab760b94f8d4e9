"""Starting several processes, and what they tell each other before any computation."""

from txcore.launch.initialize import initialize as initialize
from txcore.launch.store import barrier as barrier
from txcore.launch.store import share as share
