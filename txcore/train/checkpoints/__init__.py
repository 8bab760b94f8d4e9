"""Checkpoints: write them while a run goes on, check them before use.

Imports `_compat`, `bounded_json`, `errors`, `kernels.common`, `launch.key_value`, `layout`,
`outside`, `printing`, `train.loggers`, `train.numerics`, `train.state`.
"""
