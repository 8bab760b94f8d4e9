"""Keep equal what has to be equal on all ranks and devices: agree, compare, copy.

Imports `_compat`, `collectives`, `launch.key_value`, `launch.preflight`, `launch.watch`,
`train.checkpoints`, `train.options`, `train.state`.
"""
