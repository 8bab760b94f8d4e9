"""Which compiled collective is which declared one, and what became of each.

Imports `profiling.bandwidth`, `profiling.declared`, `profiling.hlo`, `profiling.meshes`,
`profiling.report`.
"""
