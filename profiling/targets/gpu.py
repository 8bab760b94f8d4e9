"""GPUs as XLA's compiler needs them described: its GpuTargetConfigProto, in text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class _Gpu:
    """What differs between the GPUs, from NVIDIA's data sheets and CUDA's programming guide."""

    name: str
    capability: tuple[int, int]
    cores: int
    shared_memory: int  # bytes of a multiprocessor; a block can have 1 KiB less
    l2_bytes: int
    clock_ghz: float
    memory_bytes: int
    memory_bytes_per_second: int
    fpus: int


# Sources: NVIDIA A100, H100 and H200 data sheets (SXM: cores, memory, boost clock); architecture
# white papers of the A100 and the H100 (L2, FP32 units of a multiprocessor); CUDA C++ Programming
# Guide, "Technical Specifications per Compute Capability" (shared memory, registers, threads).
_GPUS = {
    "a100": _Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 164 << 10, 40 << 20, 1.41,
        80 * 10**9, 2039 * 10**9, 64,
    ),
    "h100": _Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 228 << 10, 50 << 20, 1.98,
        80 * 10**9, 3350 * 10**9, 128,
    ),
    "h200": _Gpu(
        "NVIDIA H200", (9, 0), 132, 228 << 10, 50 << 20, 1.98,
        141 * 10**9, 4800 * 10**9, 128,
    ),
}  # fmt: skip


def target_config(chip: str) -> str:
    """Return the description of one GPU for `get_topology_desc(target_config=...)`."""
    gpu = _GPUS[chip]
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 << 10}
  shared_memory_per_block_optin: {gpu.shared_memory - 1024}
  shared_memory_per_core: {gpu.shared_memory}
  threads_per_core_limit: 2048
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus}
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.memory_bytes_per_second}
  l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory_bytes}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{gpu.name}"
"""
