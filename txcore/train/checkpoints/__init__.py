"""Checkpoints: written while a run goes on, checked before use.

Imports `_compat`, `bounded_json`, `errors`, `kernels.common`, `launch.key_value`, `layout`,
`outside`, `printing`, `train.loggers`, `train.numerics`, `train.state`.
"""
