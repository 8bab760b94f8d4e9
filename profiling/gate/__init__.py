"""The gate: blocks in which nothing may be compiled that communicates unasked.

Imports `_compat`, `profiling.audit`, `profiling.declared`, `profiling.dump`, `profiling.lock`,
`profiling.program`, `profiling.report`.
"""
