"""Measuring the candidates for a problem, on named shapes.

Imports the ops and `dispatch`.
"""
