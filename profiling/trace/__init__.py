"""What ran: a profiler's trace, joined to the program's collectives and source lines.

`record` writes a folder; `folder`, `read` and `programs` read it; `join` joins events to
instructions; `clocks`, `waits`, `steps`, `stragglers` and `figures` measure; `trace` does it all.

Imports `_compat`, `bounded_json`, `errors`, `outside`, `profiling`, `profiling.declared`,
`profiling.hlo`, `profiling.report`, `profiling.report.html`, `profiling.trace.show`, `step_events`.
"""
