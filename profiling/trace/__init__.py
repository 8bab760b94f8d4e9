"""What ran: a profiler's trace, joined to the program's collectives and source lines.

`record` writes a folder, `folder` and `read` read it, `join`, `clocks`, `waits` and `steps` make
the figures, `report` and its neighbours show them.

Imports `_compat`.
"""
