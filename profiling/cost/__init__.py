"""Count what a compiled program costs on its machine: FLOPs, bytes, memory, time.

Imports `errors`, `profiling.bandwidth`, `profiling.hlo`, `profiling.report`, `profiling.targets`.
"""
