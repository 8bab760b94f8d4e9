"""The collectives that a traced program declares, and facts about its values.

Imports `hlo` and `meshes`.
"""
