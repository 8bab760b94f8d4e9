"""Steps: traced, refused or compiled, run, evaluated and proved.

Imports `_compat`, `collectives`, `launch.preflight`, `launch.watch`, `layout`, `mesh`, `parallel`,
`parallel.gradients`, `plan`, `printing`, `profiling`, `profiling.audit`, `profiling.declared`,
`profiling.lock`, `profiling.matching`, `profiling.program`, `profiling.targets`, `step_events`,
`step_scope`, `train.batches`, `train.loggers`, `train.numerics`, `train.options`,
`train.replicas`, `train.state`, `varying`.
"""
