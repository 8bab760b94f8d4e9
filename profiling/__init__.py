"""Read any compiled jax program: which collectives are in it, and who asked for them.

Works on programs that were never written with txcore.

Imports `_compat`, `errors`, `profiling.cost`, `profiling.declared`, `profiling.gate`,
`profiling.hlo`, `profiling.lock`, `profiling.matching`, `profiling.report`,
`profiling.report.html`, `profiling.targets`.
"""

if __name__ == "profiling":  # found by its folder, not as the installed package
    raise ImportError(
        "'profiling' is installed as txcore.profiling: write 'import txcore.profiling'"
    )

from txcore.profiling.audit import AutoShardingError as AutoShardingError
from txcore.profiling.audit import assert_no_auto_sharding as assert_no_auto_sharding
from txcore.profiling.audit import audit as audit
from txcore.profiling.audit import audit_compiled as audit_compiled
from txcore.profiling.audit import audit_text as audit_text
from txcore.profiling.costs import Costs as Costs
from txcore.profiling.costs import costs as costs
from txcore.profiling.declared.collectives import Declared as Declared
from txcore.profiling.gate.block import no_auto_collectives as no_auto_collectives
from txcore.profiling.report import Collective as Collective
from txcore.profiling.report import Fate as Fate
from txcore.profiling.report import Part as Part
from txcore.profiling.report import Report as Report
