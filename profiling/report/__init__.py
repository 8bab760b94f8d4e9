"""The result of an audit: data, and its faces for people."""

from txcore.profiling.report.report import Collective as Collective
from txcore.profiling.report.report import Fate as Fate
from txcore.profiling.report.report import Part as Part
from txcore.profiling.report.report import PlanLine as PlanLine
from txcore.profiling.report.report import Report as Report
from txcore.profiling.report.report import Status as Status
