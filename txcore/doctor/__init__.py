"""Examine a machine: what it is, and whether its collectives compute what NumPy does.

Imports `_compat`, `bench`, `collectives`, `kernels`, `kernels.common`, `kernels.dispatch`,
`kernels.tuning`, `launch.key_value`, `outside`.
"""

from txcore.doctor.collectives import Checked as Checked
from txcore.doctor.collectives import check_collectives as check_collectives
from txcore.doctor.facts import Section as Section
from txcore.doctor.facts import list_facts as list_facts
from txcore.doctor.limits import Finding as Finding
from txcore.doctor.limits import find_limits as find_limits
from txcore.doctor.watchdog import Watchdog as Watchdog
