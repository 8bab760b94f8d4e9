"""Gradients of several devices, and what compressions make of them in NumPy."""

import jax
import ml_dtypes
import numpy as np
from jax.sharding import PartitionSpec as P

import txcore as tx

SHAPES = {"w": (40, 48), "conv": (3, 2, 4, 8), "b": (8,), "scale": ()}
BLOCK = 256


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)


def gradients(devices, seed=0, shapes=None):
    """Return gradients of each device, one more dim in front; some leaves are much smaller."""
    rng = np.random.default_rng(seed)
    sizes = {name: 10.0 ** -(3 * i) for i, name in enumerate(shapes or SHAPES)}
    return {
        name: (sizes[name] * rng.normal(size=(devices, *shape))).astype(np.float32)
        for name, shape in (shapes or SHAPES).items()
    }


class Run:
    """Call `tx.sync_gradients` step after step, alone inside a shard_map."""

    def __init__(self, compression, axes, shapes=None, layouts=None, check_vma=True):
        names = tuple(axes)
        params = shapes_of(gradients(1, shapes=shapes))
        sizes = list(axes.values())
        mesh = tx.MeshSpec(jax.devices()[: int(np.prod(sizes))], names, sizes)
        self.state, specs = tx.compression.start(compression, params, names, mesh)
        out = P() if layouts is None else jax.tree.map(lambda one: one.gradient, layouts)

        def sync(grads, state):
            grads = jax.tree.map(lambda g: g[0], grads)
            return tx.sync_gradients(
                grads, names, layouts=layouts, compression=compression, comm_state=state
            )

        mapped = jax.shard_map(
            sync,
            mesh=mesh.mesh,
            in_specs=(P(names), specs),
            out_specs=(out, specs),
            check_vma=check_vma,
        )
        self.sync, self.place = jax.jit(mapped), mesh.sharding(names)

    def step(self, grads):
        means, self.state = self.sync(jax.device_put(grads, self.place), self.state)
        return jax.tree.map(np.asarray, means)

    @property
    def pending(self):
        """The mean over the devices of what is left over."""
        return {k: np.float64(e).mean(0) for k, e in self.state["compression"]["errors"].items()}


def flat(grads):
    return np.concatenate(
        [np.float64(grads[k]).reshape(len(grads[k]), -1) for k in sorted(grads)], axis=1
    )


def exact(grads):
    return {k: np.float64(g).mean(0) for k, g in grads.items()}


def by_blocks(function, rows):
    return np.concatenate([function(rows[i : i + BLOCK]) for i in range(0, len(rows), BLOCK)])


def through_int8(values):
    step = np.float64(np.float32(np.abs(values).max() / 127)) or 1.0
    return np.rint(values / step) * step


def through_fp16(values):
    scale = 2.0 ** (15 - np.frexp(np.abs(values).max())[1])
    return np.float64(np.float16(values * scale)) / scale


def through_bf16(values):
    return np.float64(np.float32(values).astype(ml_dtypes.bfloat16))


class Quantized:
    """Rounded on each device, averaged by the device of the share, rounded again."""

    def __init__(self, through, feedback):
        self.through, self.feedback, self.errors = through, feedback, 0.0

    def step(self, grads):
        pending = flat(grads) + self.errors
        devices, size = pending.shape
        rows = np.pad(pending, ((0, 0), (0, -size % devices))).reshape(devices, devices, -1)
        sent = np.stack([[by_blocks(self.through, row) for row in own] for own in rows])
        means = sent.mean(0)
        out = np.stack([by_blocks(self.through, row) for row in means])
        errors = rows - sent
        for i in range(devices):
            errors[i, i] += devices * (means[i] - out[i])
        self.errors = errors.reshape(devices, -1)[:, :size] * self.feedback
        return out.reshape(-1)[:size]


class TopK:
    def __init__(self, fraction):
        self.fraction, self.errors = fraction, 0.0

    def step(self, grads):
        pending = flat(grads) + self.errors
        count = int(np.ceil(self.fraction * pending.shape[1]))
        sent = np.zeros_like(pending)
        for own, out in zip(pending, sent, strict=True):
            chosen = np.argsort(-np.abs(own))[:count]
            out[chosen] = own[chosen]
        self.errors = pending - sent
        return sent.mean(0)


class LowRank:
    """PowerSGD by NumPy's QR; `first` are the factors that a run begins with."""

    def __init__(self, rank, first):
        self.rank, self.factors, self.errors = rank, first, {}

    def step(self, grads):
        out = {}
        for name, g in grads.items():
            g = np.asarray(g, np.float64)
            height, width = int(np.prod(g.shape[1:-1])), g.shape[-1] if g.ndim > 1 else 1
            if (height + width) * self.rank * 2 >= height * width:
                out[name] = g.mean(0)
                continue
            pending = g.reshape(-1, height, width) + self.errors.get(name, 0)
            left, _ = np.linalg.qr((pending @ self.factors[name]).mean(0))
            right = (pending.transpose(0, 2, 1) @ left).mean(0)
            self.factors[name] = right
            self.errors[name] = pending - left @ right.T
            out[name] = (left @ right.T).reshape(g.shape[1:])
        return np.concatenate([out[k].reshape(-1) for k in sorted(out)])
