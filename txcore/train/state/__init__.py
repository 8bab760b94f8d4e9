"""The train state: what a run is a function of, how it lies on the mesh, whose it is.

Imports `_compat`, `collectives`, `kept`, `kernels.common`, `layout`, `mesh`, `optim`, `parallel`,
`parallel.gradients`, `parallel.zero`, `plan`, `printing`, `step_scope`, `train.numerics`,
`train.options`, `train.replicas`, `varying`.
"""
