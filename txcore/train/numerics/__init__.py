"""The numbers of a step: precision, loss scale, non-finite values, random keys.

Imports `collectives`, `kernels.common`, `layout`, `train.state`.
"""
