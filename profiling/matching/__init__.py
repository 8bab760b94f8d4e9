"""Match compiled collectives with declared ones, and tell what became of each.

Imports `profiling.bandwidth`, `profiling.declared`, `profiling.hlo`, `profiling.meshes`,
`profiling.report`.
"""
