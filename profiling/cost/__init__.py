"""What a compiled program costs on its machine: FLOPs, bytes, memory, time.

Imports `hlo` and `targets`.
"""
