"""Measurements of the candidates for a problem, on named shapes.

Imports `_compat`, `kernels`, `kernels.common`, `kernels.dispatch`.
"""
