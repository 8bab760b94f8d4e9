"""The peaks of the chips that programs can be compiled for, from public data sheets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """The peaks of one chip, one jax device. All rates are of one direction, per second.

    Attributes:
      name: as in a target ("v5p", "h100").
      bf16_flops: dense FLOP/s of a bfloat16 matrix product.
      f32_flops: dense FLOP/s of a float32 matrix product in jax's default precision: TF32 on
        GPUs, one bfloat16 pass on TPUs (`jax.lax.Precision.DEFAULT`).
      hbm_bytes: the size of its memory.
      hbm_bytes_per_second: the rate of its memory.
      links: fast links (TPU: ICI, along each way of each dim of the torus; GPU: one, NVLink
        through a switch).
      link_bytes_per_second: what one of them sends.
      linked: devices that reach each other over fast links: GPUs in a host, chips of a TPU's
        largest slice.
      network_bytes_per_second: what a device sends to those out of reach; None where a target
        has none (a TPU target is one slice).
    """

    name: str
    bf16_flops: float
    f32_flops: float
    hbm_bytes: float
    hbm_bytes_per_second: float
    links: int
    link_bytes_per_second: float
    linked: int
    network_bytes_per_second: float | None


# TPUs: Google Cloud TPU documentation, "System architecture" of each version: peak compute,
# HBM, "Bidirectional inter-chip interconnect bandwidth per chip" (v4: 600, v5e: 400, v5p: 1200,
# v6e: 800 GB/s; half of it is sent, over 6 links of a 3D torus, 4 of a 2D one), and the largest
# slice.
_TPUS = (
    Chip("v4", 275e12, 275e12, 32 * 2**30, 1200e9, 6, 50e9, 4096, None),
    Chip("v5e", 197e12, 197e12, 16e9, 800e9, 4, 50e9, 256, None),
    Chip("v5p", 459e12, 459e12, 95 * 2**30, 2765e9, 6, 100e9, 6144, None),
    Chip("v6e", 918e12, 918e12, 32e9, 1600e9, 4, 100e9, 256, None),
)

# GPUs: NVIDIA's data sheets of the A100 80GB SXM, H100 SXM and H200 SXM (tensor cores without
# sparsity, half of NVLink's total 600 or 900 GB/s), and of the DGX A100, H100 and H200: 8 GPUs,
# one 200 Gb/s (ConnectX-6) or 400 Gb/s (ConnectX-7) InfiniBand port for each.
_GPUS = (
    Chip("a100", 312e12, 156e12, 80e9, 2039e9, 1, 300e9, 8, 25e9),
    Chip("h100", 989.4e12, 494.7e12, 80e9, 3350e9, 1, 450e9, 8, 50e9),
    Chip("h200", 989.4e12, 494.7e12, 141e9, 4800e9, 1, 450e9, 8, 50e9),
)

CHIPS = {"tpu": {c.name: c for c in _TPUS}, "cuda": {c.name: c for c in _GPUS}}
