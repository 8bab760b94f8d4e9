"""What the GPU kernels must move and compute, what they do, and how close that can come to a peak.

`python benchmarks/gpu/gpu_arithmetic.py` needs no GPU. It prints the table of docs/kernels.md, with
the H200's measured times beside those that the counts predict for it.
"""

import json
import pathlib
import warnings
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
MEASURED = ROOT / "benchmarks" / "results" / "gpu_NVIDIA_H200.json"
F32, BF16 = "float32", "bfloat16"
HEADERS = (
    *("problem, with gradients", "least MB", "least GFLOP", "launches", "loads, stores MB"),
    *("bound by", "H100 µs", "of its peak", "H200 µs", "measured"),
)


def list_problems() -> Iterator[tuple]:
    """Yield (shape, dtype) of the problems that were measured, and others of the same ops."""
    from txcore.kernels.tuning import shapes

    pooled = {"activation": "relu", "pool": 2}
    image, half = (1024, 28, 28, 1), (256, 14, 14, 32)
    yield shapes.conv_shape("conv1-3x3-b1024", image, (3, 3, 1, 32), first=True, **pooled), F32
    yield shapes.conv_shape("conv1-5x5-b1024", image, (5, 5, 1, 32), first=True, **pooled), F32
    yield shapes.conv_shape("conv2-3x3-b256", half, (3, 3, 32, 64), **pooled), BF16
    yield shapes.dense_shape("dense-512x1024x4096", (512, 1024), 4096, activation="relu"), BF16
    yield shapes.loss_shape("loss-4096x32k", (4096, 32_000)), BF16
    yield shapes.loss_shape("loss-4096x128k", (4096, 128_256)), BF16
    yield shapes.linear_loss_shape("linear-loss-4096x2048x32k", (4096, 2048), 32_000), BF16
    yield shapes.SHAPES["dropout-cnn-drop-b256"], BF16
    for shape in shapes.bucket_shapes("67M", 1 << 26):
        yield shape, F32


def count_shape(shape, dtype: str) -> tuple[str, list]:
    """Return the label of a shape's best guess for a GPU, and the counts of each launch of it."""
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType

    from txcore.kernels.dispatch.tuned import fields_of
    from txcore.kernels.dispatch.tuning_file import label_candidate
    from txcore.kernels.tuning.arithmetic import count_kernels
    from txcore.kernels.tuning.measure import problem_of

    def run(gradients, *operands):
        def forward(*some):
            given = dict(zip(shape.differentiable, some, strict=True))
            values = (given.get(i, x) for i, x in enumerate(operands))
            return shape.call_op(*values, implementation="pallas_triton")

        if not shape.differentiable:
            return forward()
        out, transpose = jax.vjp(forward, *(operands[i] for i in shape.differentiable))
        return out, transpose(gradients)

    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("i",), (AxisType.Auto,), abstract_device=device)
    operands = shape.make_structs(dtype)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        problem, kernels = problem_of(shape, dtype)
        config = kernels["pallas_triton"].configs(problem)[0]
        gradients = jax.eval_shape(shape.call_op, *operands)
        jaxpr = jax.jit(run).trace(gradients, *operands).jaxpr
    return label_candidate("pallas_triton", fields_of(config)), count_kernels(jaxpr)


def describe_shape(shape, dtype: str, measured: dict) -> tuple:
    """Return a shape's row of the table."""
    from txcore.kernels.tuning.arithmetic import GPUS, seconds_by_limit

    label, launches = count_shape(shape, dtype)
    least_bytes = shape.count_bytes(dtype, backward=True)
    flops = shape.count_flops(backward=True)
    times, limits = {}, {}
    for name, gpu in GPUS.items():
        spent = [seconds_by_limit(counts, gpu) for counts in launches]
        times[name] = sum(max(limit.values()) for limit in spent)
        limits[name] = max(spent, key=lambda limit: max(limit.values()))
    gpu = GPUS["H100"]
    peak = gpu.half_products if dtype == "bfloat16" else gpu.floats
    ceiling = max(least_bytes / gpu.memory, flops / peak)
    seen = measured.get((f"{shape.name} {dtype}", label))
    return (
        f"{shape.op} {shape.name}, {dtype}",
        f"{least_bytes / 1e6:,.0f}",
        f"{flops / 1e9:,.1f}",
        str(len(launches)),
        f"{sum(counts.loads for counts in launches) / 1e6:,.0f}",
        max(limits["H100"], key=limits["H100"].get).replace("_", " "),
        f"{times['H100'] * 1e6:,.0f}",
        f"{ceiling / times['H100']:.2f}",
        f"{times['H200'] * 1e6:,.0f}",
        f"{seen:,.0f}" if seen is not None else "",
    )


def read_measured() -> dict[tuple[str, str], float]:
    """Return the measured microseconds of each case and candidate."""
    parts = json.loads(MEASURED.read_text())["parts"].values()
    rows = [row for part in parts for row in part if "us" in row]
    return {(row["case"], row["name"]): row["us"] for row in rows}


def format_table() -> str:
    """Return the table in Markdown."""
    measured = read_measured()
    rows = [HEADERS, ("---",) * len(HEADERS)]
    rows += [describe_shape(shape, dtype, measured) for shape, dtype in list_problems()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(format_table())
