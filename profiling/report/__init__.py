"""The result of an audit: data, and its faces for people.

Imports `outside`, `profiling.compiled_with`, `profiling.declared`, `profiling.program`,
`profiling.report.html`.
"""

from txcore.profiling.report.findings import Findings as Findings
from txcore.profiling.report.findings import Status as Status
from txcore.profiling.report.report import Report as Report
from txcore.profiling.report.rows import Collective as Collective
from txcore.profiling.report.rows import Fate as Fate
from txcore.profiling.report.rows import Part as Part
from txcore.profiling.report.rows import PlanLine as PlanLine
