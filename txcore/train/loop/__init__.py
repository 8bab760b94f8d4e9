"""The training loop: batches in, steps out, records to the loggers, signals between two steps.

Imports `_compat`, `kernels.common`, `launch.watch`, `printing`, `step_events`, `train.batches`,
`train.checkpoints`, `train.loggers`, `train.numerics`, `train.replicas`, `train.state`,
`train.steps`.
"""
