"""Which implementation of an op runs, and why: the registry and what was measured.

Imports `_compat`, `bounded_json`, `errors`, `outside`.
"""
