"""The parts of a run on a GPU that time kernels, and the card's own copy and products."""

import math
import subprocess
import sys
import time

import gpu_cases
from gpu_cases import compile_plain, make_normals, max_pool, time_cases


def measure_ceilings() -> list[dict]:
    """Measure the card's copy and products, and name the card and the versions."""
    import jax
    import jax.numpy as jnp

    from txcore.kernels.tuning import timing

    x = jax.random.normal(jax.random.key(0), (1 << 27,))
    side = jax.random.normal(jax.random.key(1), (8192, 8192))
    half = side.astype(jnp.bfloat16)
    calls = {
        "copy": compile_plain(lambda x: x + 1, x),
        "matmul bf16": compile_plain(jnp.dot, half, half),
        "matmul f32 (TF32)": compile_plain(jnp.dot, side, side),
        "matmul f32 (highest)": compile_plain(
            lambda a, b: jnp.dot(a, b, precision="highest"), side, side
        ),
    }
    if gpu_cases.is_dry():
        return [{"case": "ceiling", "name": name} for name in calls]
    times = timing.device_times(calls, 7)
    made = {name: (8 * x.size if name == "copy" else 2 * 8192**3) for name in calls}
    rows = [
        {"case": "ceiling", "name": name, "value": made[name] / us * 1e6}
        for name, (us, _) in times.items()
    ]
    machine = {
        "name": "machine",
        "card": jax.devices()[0].device_kind,
        "driver": ask_driver(),
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
        "python": sys.version.split()[0],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    return [machine, *rows]


def ask_driver() -> str:
    """Return what nvidia-smi says of the card and the driver."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip()


def time_updates() -> list[dict]:
    """Time the flat updates and the norm."""
    import jax.numpy as jnp

    from txcore.kernels.tuning.shapes import bucket_shapes

    rows = []
    for name, size in (("cnn3x3", 421_642), ("odd-67M", (1 << 26) + 5), ("67M", 1 << 26)):
        for shape in bucket_shapes(name, size):
            operands = [jnp.abs(x) for x in make_normals(shape.shapes, jnp.float32)]
            rows += time_cases(shape, "float32", operands, backward=False)
    return rows


def time_packing() -> list[dict]:
    """Time pack and unpack of a few long and of 200 short arrays, and other ways in XLA."""
    import jax.numpy as jnp
    import numpy as np
    from jax import lax

    from txcore.kernels.tuning.shapes import Shape

    random = np.random.default_rng(0)
    short = tuple((int(n),) for n in random.integers(64, 4096, 200))
    long = tuple((n,) for n in (40_000_000, 9_000_001, 4_000_000, 1_500_000, 800_000))

    def update_slices(*arrays):
        out, start = jnp.zeros(sum(a.size for a in arrays), arrays[0].dtype), 0
        for a in arrays:
            out, start = lax.dynamic_update_slice(out, a, (start,)), start + a.size
        return out

    def two_levels(*arrays):
        parts = [jnp.concatenate(arrays[i : i + 16]) for i in range(0, len(arrays), 16)]
        return jnp.concatenate(lax.optimization_barrier(parts))

    rows = []
    for name, leaves in (("200-short", short), ("5-long", long)):
        arrays = make_normals(leaves, jnp.float32)
        others = {
            "xla two levels": compile_plain(two_levels, *arrays),
            "xla update slices": compile_plain(update_slices, *arrays),
        }
        # Pallas' Triton lowering takes a minute to compile 200 short arrays, and never won.
        named = ("xla", "triton_ir", "jax_triton")
        rows += time_cases(
            Shape(f"pack-{name}", "pack", leaves, fixed=tuple(range(len(leaves)))),
            "float32",
            arrays,
            others=others,
            named=named,
        )
        scaled = Shape(
            f"pack-{name}-to-bf16-scaled",
            "pack",
            leaves,
            {"dtype": "bfloat16", "scale": 0.5},
            fixed=tuple(range(len(leaves))),
        )
        rows += time_cases(scaled, "float32", arrays, named=named)
        flat = (sum(map(math.prod, leaves)),)
        shape = Shape(f"unpack-{name}", "unpack", (flat,), {"shapes": leaves}, fixed=(0,))
        rows += time_cases(shape, "float32", make_normals([flat], jnp.float32), named=named)
    return rows


def time_losses() -> list[dict]:
    """Time the losses of large vocabularies, with gradients."""
    import jax
    import jax.numpy as jnp

    from txcore.kernels.tuning.shapes import linear_loss_shape, loss_shape

    def make_labels(rows, classes):
        return jax.random.randint(jax.random.key(3), (rows,), 0, classes)

    def hold_logits(g, x, w, b, y):
        def losses_of(x, w, b):
            logits = (x @ w + b).astype(jnp.float32)
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], -1)[:, 0]

        out, transpose = jax.vjp(losses_of, x, w, b)
        return out, transpose(g)

    rows = []
    for name, (n, c), dtype in (
        ("loss-4096x32k", (4096, 32_000), "bfloat16"),
        ("loss-4096x32k", (4096, 32_000), "float32"),
        ("loss-4096x128k", (4096, 128_256), "bfloat16"),
        ("loss-512x32k", (512, 32_000), "bfloat16"),
    ):
        operands = [*make_normals([(n, c)], dtype), make_labels(n, c)]
        rows += time_cases(loss_shape(name, (n, c)), dtype, operands)
    n, d, c = 4096, 2048, 32_000
    x, w, b = make_normals([(n, d), (d, c), (c,)], jnp.bfloat16)
    operands = [x, w / 45, b, make_labels(n, c)]
    others = {"xla whole logits": compile_plain(hold_logits, jnp.linspace(-1, 1, n), *operands)}
    rows += time_cases(
        linear_loss_shape("linear-loss-4096x2048x32k", (n, d), c),
        "bfloat16",
        operands,
        others=others,
    )
    return rows


def time_convolutions() -> list[dict]:
    """Time the first convolutions with their gradients, and the dense layer."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    from txcore.kernels.tuning.shapes import conv_shape, dense_shape

    def convolve_plainly(g, x, w, b):
        def pooled_of(w, b):
            y = lax.conv_general_dilated(
                x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            y = jax.nn.relu(y + b)
            return max_pool(y)

        out, transpose = jax.vjp(pooled_of, w, b)
        return out, transpose(g)

    rows = []
    for size in (3, 5):
        for batch in (64, 256, 1024):
            for dtype in ("float32", "bfloat16") if (batch, size) == (256, 3) else ("float32",):
                shapes = ((batch, 28, 28, 1), (size, size, 1, 32), (32,))
                operands = make_normals(shapes, dtype)
                g = jnp.ones((batch, 14, 14, 32), dtype)
                shape = conv_shape(
                    f"conv1-{size}x{size}-b{batch}",
                    *shapes[:2],
                    first=True,
                    activation="relu",
                    pool=2,
                )
                others = {"xla plain": compile_plain(convolve_plainly, g, *operands)}
                rows += time_cases(shape, dtype, operands, others=others)
    shape = dense_shape("dense-512x1024x4096", (512, 1024), 4096, activation="relu")
    rows += time_cases(shape, "bfloat16", make_normals(shape.shapes, jnp.bfloat16))
    return rows
