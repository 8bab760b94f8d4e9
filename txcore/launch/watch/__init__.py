"""The watch: name a rank that dies or stalls, and end all others.

Imports `_compat`, `errors`.
"""

from txcore.launch.watch.status import Phase as Phase
from txcore.launch.watch.watch import at as at
from txcore.launch.watch.watch import failed as failed
from txcore.launch.watch.watch import hear_of_end as hear_of_end
from txcore.launch.watch.watch import meet as meet
from txcore.launch.watch.watch import reach as reach
from txcore.launch.watch.watch import request_stop as request_stop
from txcore.launch.watch.watch import start as start
from txcore.launch.watch.watch import stop_reason as stop_reason
