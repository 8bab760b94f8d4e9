"""Which implementation of an op runs, and why: the registry and the measured times.

Imports `_compat`, `bounded_json`, `errors`, `outside`.
"""
