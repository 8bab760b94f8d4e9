"""What the kernels share: checks, random bits, tiles.

Imports `_compat`, `kernels.dispatch`, `varying`.
"""
