"""Batches: which leaves hold examples, and how they are placed on the mesh.

Imports `layout`, `mesh`, `plan`, `train.replicas`.
"""
