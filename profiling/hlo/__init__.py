"""Read the text of compiled programs: what is in a module, and every collective in it.

Imports `errors`, `tags`.
"""

from txcore.profiling.hlo.collectives import Op, collectives_of, find_collectives
from txcore.profiling.hlo.groups import NO_GROUPS, Groups, groups_of_block, sort_groups
from txcore.profiling.hlo.operands import Input
from txcore.profiling.hlo.text import KINDS, Computation, Instruction, Module, read_modules
from txcore.profiling.hlo.types import HloError, Shape, parse_shapes

__all__ = [
    "KINDS",
    "NO_GROUPS",
    "Computation",
    "Groups",
    "HloError",
    "Input",
    "Instruction",
    "Module",
    "Op",
    "Shape",
    "collectives_of",
    "find_collectives",
    "groups_of_block",
    "parse_shapes",
    "read_modules",
    "sort_groups",
]
