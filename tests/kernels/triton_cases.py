"""What the tests of GPU kernels share: lowering for an absent GPU, PTX, and Triton's ptxas."""

import pathlib
import re
import subprocess

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

GPUS = {80: "NVIDIA A100-SXM4-80GB", 90: "NVIDIA H100 80GB HBM3"}
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}  # bytes of a block: CUDA's programming guide
REGISTERS = 65536  # of a multiprocessor


def mesh_of(kind):
    """Return an abstract mesh of one GPU of a kind."""
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    return AbstractMesh((1,), ("i",), (AxisType.Auto,), abstract_device=device)


def lower_module(function, *shapes, kind=GPUS[90]):
    """Return a program lowered for a GPU that is not here."""
    with jax.sharding.use_abstract_mesh(mesh_of(kind)):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))


def read_kernels(lowered):
    """Return the IR, warps and stages of each kernel that XLA is to compile by Triton, once."""
    from jaxlib.mlir import ir

    found = {}

    def visit(operation):
        attributes = operation.attributes
        if operation.name == "stablehlo.custom_call" and "xla.gpu.triton" in str(
            attributes["call_target_name"]
        ):
            config = {a.name: a.attr for a in attributes["mhlo.backend_config"]}
            code = _read_ir(config["ir"].value_bytes)
            found[code] = (code, int(config["num_warps"]), int(config["num_stages"]))
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return list(found.values())


def _read_ir(code):
    """Return a kernel's module as text: Pallas writes it as bytecode of jaxlib's own version."""
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect

    if not code.startswith(b"ML\xefR"):
        return code.decode()
    context = ir.Context()
    dialect.register_dialect(context)
    return str(ir.Module.parse(code, context))


def compile_ir(code, warps, stages, arch, folder):
    """Compile a kernel by Triton; return its PTX, and the bytes of shared memory of a block."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    source = folder / "kernel.ttir"
    source.write_text(code)
    backend = CUDABackend(GPUTarget("cuda", arch, 32))
    options = backend.parse_options({"num_warps": warps, "num_stages": stages})
    context, metadata = ir.context(), {}
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = ir.parse_mlir_module(str(source), context)
    module.context = context
    for stage in (backend.make_ttir, backend.make_ttgir, backend.make_llir, backend.make_ptx):
        module = stage(module, metadata, options, arch)
    return module, metadata["shared"]


def assemble(ptx, folder):
    """Assemble PTX by Triton's ptxas; return the registers of a thread and the bytes it spills."""
    import triton

    ptxas = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    source, (arch,) = folder / "kernel.ptx", re.findall(r"\.target (\w+)", ptx)
    source.write_text(ptx)
    done = subprocess.run(
        [ptxas, "-v", f"-arch={arch}", str(source), "-o", str(folder / "kernel.cubin")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (registers,) = re.findall(r"Used (\d+) registers", done.stderr)
    spilled = re.findall(r"(\d+) bytes spill", done.stderr)
    return int(registers), sum(map(int, spilled))
