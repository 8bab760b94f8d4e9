"""The sections of the HTML page; `page` puts them together.

Imports `outside`, `profiling.declared`, `profiling.report`.
"""
