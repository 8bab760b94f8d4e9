"""The collectives that a traced program declares, and facts about its values.

Imports `_compat`, `profiling.hlo`, `profiling.meshes`, `tags`, `varying`.
"""
