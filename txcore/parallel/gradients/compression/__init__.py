"""Compression: gradients averaged with fewer bytes on the wire, and what that keeps.

Imports `collectives`, `kept`, `kernels.common`, `layout`, `parallel`, `parallel.gradients`,
`parallel.gradients.algorithms`, `varying`.
"""

from txcore.parallel.gradients.compression.feedback import start as start
from txcore.parallel.gradients.compression.named import as_compression as as_compression
from txcore.parallel.gradients.compression.powersgd import powersgd as powersgd
from txcore.parallel.gradients.compression.quantized import bf16 as bf16
from txcore.parallel.gradients.compression.quantized import fp16 as fp16
from txcore.parallel.gradients.compression.quantized import int8 as int8
from txcore.parallel.gradients.compression.record import Compression as Compression
from txcore.parallel.gradients.compression.record import Exchange as Exchange
from txcore.parallel.gradients.compression.top_k import top_k as top_k
