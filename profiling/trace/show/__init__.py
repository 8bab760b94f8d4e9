"""Show a trace: in the terminal, as plain data, as a page, for Perfetto, and against another.

Imports `outside`, `profiling.report`, `profiling.report.html`, `profiling.trace`.
"""
