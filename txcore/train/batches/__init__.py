"""Batches: which leaves hold examples, and how they are placed on the mesh.

Imports `kernels.common`, `launch`, `launch.watch`, `layout`, `mesh`, `plan`, `train.replicas`.
"""
