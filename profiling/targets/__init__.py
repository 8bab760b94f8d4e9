"""Machines to compile for, present or not.

Imports `_compat`.
"""

from txcore.profiling.targets.chips import CHIPS as CHIPS
from txcore.profiling.targets.chips import Chip as Chip
from txcore.profiling.targets.target import Target as Target
from txcore.profiling.targets.target import parse_target as parse_target
