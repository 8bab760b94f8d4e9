"""Batches: which leaves hold examples, and how they are placed on the mesh.

Imports `_compat`, `kernels.common`, `launch.key_value`, `launch.watch`, `layout`, `mesh`, `plan`,
`train.replicas`.
"""
