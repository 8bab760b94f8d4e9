"""Parity: whether two runs of one computation agree, and where they part.

Imports `_compat`, `layout`, `parallel.context`, `plan`, `train`,
`train.numerics`.
"""

from txcore.parity.agreement import Agreement as Agreement
from txcore.parity.agreement import norm_of as norm_of
from txcore.parity.agreement import of_inputs as of_inputs
from txcore.parity.agreement import of_rounding as of_rounding
