"""The result of an audit: data, and its faces for people."""

from txcore.profiling.report.model import Collective as Collective
from txcore.profiling.report.model import Fate as Fate
from txcore.profiling.report.model import Part as Part
from txcore.profiling.report.model import PlanLine as PlanLine
from txcore.profiling.report.model import Report as Report
