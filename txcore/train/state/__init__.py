"""The train state: what a run is a function of, how it lies on the mesh, whose it is.

Imports x.
"""
