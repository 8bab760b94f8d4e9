"""Measurements of the candidates for a problem, on named shapes.

Imports `kernels`, `kernels.common`, `kernels.dispatch`.
"""
