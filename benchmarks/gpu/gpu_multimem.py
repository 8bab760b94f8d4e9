"""The part of a run on several GPUs of a node that times the collectives by multimem and NCCL's."""

import gpu_cases

MIB = 1 << 20
SIZES = (MIB, 16 * MIB, 256 * MIB)  # of the whole array


def time_collectives() -> list[dict]:
    """Time and check `algorithm="remote_dma"` beside XLA's own collectives; [] on one GPU."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    import txcore as tx
    from txcore.kernels.tuning import timing

    devices = jax.devices()
    if len(devices) == 1 or gpu_cases.is_dry():
        return []
    mesh = Mesh(np.array(devices), ("data",))
    rows = []
    for dtype in ("float32", "bfloat16"):
        for size in SIZES:
            shape = (size // jnp.dtype(dtype).itemsize,)
            whole = jax.random.normal(jax.random.key(0), shape).astype(dtype)
            for name, collective in {
                "all_gather": tx.all_gather,
                "reduce_scatter": tx.reduce_scatter,
                "psum": tx.psum,
            }.items():
                spec = P("data") if name == "all_gather" else P()
                x = jax.device_put(whole, NamedSharding(mesh, spec))
                calls, results = {}, {}
                for way in (None, "remote_dma"):

                    def run(x, collective=collective, way=way):
                        return collective(tx.vary(x, "data"), "data", algorithm=way)

                    mapped = jax.shard_map(
                        run,
                        mesh=mesh,
                        in_specs=spec,
                        out_specs=P() if name == "psum" else P("data"),
                    )
                    label = "XLA" if way is None else way
                    calls[label] = gpu_cases.compile_plain(mapped, x)
                    results[label] = np.asarray(calls[label](), np.float32)
                error = np.abs(results["XLA"] - results["remote_dma"]).max()
                for label, (us, count) in timing.device_times(calls, 10).items():
                    row = {"case": f"{name} {size // MIB} MiB {dtype}", "name": label, "us": us}
                    rows.append(row | {"kernels": count, "error": float(error)})
                print(rows[-2:], flush=True)
    return rows
