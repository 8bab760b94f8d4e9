"""What the kernels share: argument checks, random bits, tiles of a matrix, chunks of a batch.

Imports `_compat`, `kernels.dispatch`, `varying`.
"""
