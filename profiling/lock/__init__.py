"""The lock file: a program's communication, reviewed like a snapshot, checked against growth.

    report = audit(fn, *args)
    lock.update("collectives.lock.json", report)        # once, and after each wanted change
    lock.check("collectives.lock.json", report).ok      # False on any growth

`txcore lock update|check` and the pytest fixture `collectives_lock` do the same.

Imports `_compat`, `bounded_json`, `errors`, `outside`, `profiling.declared`, `profiling.program`,
`profiling.report`, `profiling.report.html`.
"""

from txcore.profiling.lock.check import Outcome as Outcome
from txcore.profiling.lock.check import check as check
from txcore.profiling.lock.check import update as update
from txcore.profiling.lock.diff import Change as Change
from txcore.profiling.lock.diff import compare as compare
from txcore.profiling.lock.model import Entry as Entry
from txcore.profiling.lock.model import Lock as Lock
from txcore.profiling.lock.model import LockError as LockError
from txcore.profiling.lock.model import lock_of as lock_of
from txcore.profiling.lock.model import target_of as target_of
from txcore.profiling.lock.proof import Proof as Proof
from txcore.profiling.lock.proof import proof_of as proof_of
