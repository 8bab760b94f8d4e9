"""Checkpoints: saved while a run goes on, checked before they are used.

Imports `_compat`, `bounded_json`, `errors`, `kernels.common`, `launch.key_value`, `outside`,
`printing`, `train.loggers`, `train.numerics`, `train.state`.
"""
