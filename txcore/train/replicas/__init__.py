"""What must be equal on all ranks and devices: agreed on, compared, copied.

Imports `_compat`, `collectives`, `launch.key_value`, `launch.preflight`, `launch.watch`,
`train.checkpoints`, `train.options`, `train.state`.
"""
