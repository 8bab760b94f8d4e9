"""What the kernels share: checks, random bits, tiles.

Imports only `_compat`.
"""
