"""A model whose layers all differ, by tx.pipeline on a mesh and as plain jax on one device."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import txcore as tx

WORDS, WIDTH = 7, 4
LAYER = {"w": 2, "b": 1, "u": 2}  # the dims of one layer's parameters


def init(layers, *, tied, dtype=np.float64):
    """Return parameters with stacked layers, each of which does something else."""
    rng = np.random.default_rng(1)
    shapes = {"w": (WIDTH, 2 * WIDTH), "b": (2 * WIDTH,), "u": (2 * WIDTH, WIDTH)}
    stacked = {n: rng.normal(0, 0.5, (layers, *s)).astype(dtype) for n, s in shapes.items()}
    ends = {"embed": rng.normal(size=(WORDS, WIDTH)).astype(dtype)}
    if not tied:
        ends["head"] = rng.normal(size=(WORDS, WIDTH)).astype(dtype)
    return {**ends, "layers": stacked}


def make_batch(rows, *, seed=2):
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, WORDS, rows).astype(np.int32) for name in ("word", "next")}


def make_mask(rows):
    """Return a mask with another number of real examples in each microbatch."""
    return (np.random.default_rng(3).random(rows) < np.linspace(0.2, 0.9, rows)).astype(np.float64)


def embed(ends, batch):
    return ends["embed"][batch["word"]]


def layer(params, x):
    return x + jnp.tanh(x @ params["w"] + params["b"]) @ params["u"]


def block(chunk, x, batch, stage):
    for i in range(chunk["w"].shape[0]):
        x = layer(jax.tree.map(lambda a, i=i: a[i], chunk), x)
    return x


def scanned_block(chunk, x, batch, stage):
    return jax.lax.scan(lambda x, params: (layer(params, x), None), x, chunk)[0]


def losses_of(ends, x, batch):
    log_p = jax.nn.log_softmax(x @ ends.get("head", ends["embed"]).T)
    return -jnp.take_along_axis(log_p, batch["next"][:, None], 1)[:, 0]


def reference(params, batch, mask=None):
    """Return loss and gradients on one device, by jax.value_and_grad of the whole model."""

    def loss_of(params):
        ends = {name: part for name, part in params.items() if name != "layers"}
        x = block(params["layers"], embed(ends, batch), batch, 0)
        losses = losses_of(ends, x, batch)
        return jnp.mean(losses) if mask is None else jnp.sum(losses * mask) / jnp.sum(mask)

    return jax.device_get(jax.jit(jax.value_and_grad(loss_of))(params))


@dataclass(frozen=True)
class Case:
    """Hold one pipeline on one mesh.

    Attributes:
      schedule: its name.
      p: stages.
      m: microbatches.
      v: chunks.
      d: devices of the data axis.
      tied: whether embedding and head are one.
      kind: "kept", "again" (recomputed) or "scan".
      masked: whether some examples do not count.
      layers: of the model, 0 for one in each chunk.
    """

    schedule: str
    p: int = 2
    m: int = 4
    v: int = 1
    d: int = 1
    tied: bool = True
    kind: str = "kept"
    masked: bool = False
    layers: int = 0

    @property
    def rows(self):
        return 2 * self.m * self.d

    def __str__(self):
        return f"{self.schedule}-p{self.p}m{self.m}v{self.v}d{self.d}" + "".join(
            f"-{name}" for name in ("tied" * self.tied, self.kind, "masked" * self.masked) if name
        )

    def make_schedule(self):
        return tx.pipeline.make_schedule(
            self.schedule, stages=self.p, microbatches=self.m, chunks=self.v
        )

    def params(self, dtype=np.float64):
        return init(self.layers or self.p * self.v, tied=self.tied, dtype=dtype)

    def functions(self):
        blocks = {"kept": block, "again": jax.checkpoint(block), "scan": scanned_block}
        return embed, blocks[self.kind], losses_of

    def make_step(self, functions=None):
        """Return step(params, batch, mask) -> (loss, gradients, evaluated loss), jitted."""
        schedule = self.make_schedule()
        first, block, last = functions or self.functions()
        specs = {name: P() for name in self.params() if name != "layers"}
        specs["blocks"] = P("pipe") if self.v == 1 else P(None, "pipe")

        def step(params, batch, mask):
            options: Any = {"axis": "pipe", "data_axis": "data"}
            differentiate = tx.pipeline.value_and_grad(first, block, last, schedule, **options)
            both = differentiate(params, batch, mask=mask)
            evaluated = tx.pipeline.evaluate(first, block, last, schedule, **options)
            return tx.pmean((*both, evaluated(params, batch, mask=mask)), "data", name="mean")

        rows = P("data")
        mapped = jax.shard_map(
            step, mesh=self.mesh(), in_specs=(specs, rows, rows), out_specs=(P(), specs, P())
        )
        return jax.jit(mapped)

    def mesh(self):
        devices = np.array(jax.devices()[: self.p * self.d], dtype=object)
        shape = (self.p, self.d)
        return Mesh(devices.reshape(shape), ("pipe", "data"), axis_types=(AxisType.Auto,) * 2)

    def inputs(self):
        """Return (params as the pipeline takes them, batch, mask)."""
        params = self.params()
        blocks = tx.pipeline.split_layers(params.pop("layers"), self.make_schedule())
        batch = make_batch(self.rows)
        return {**params, "blocks": blocks}, batch, make_mask(self.rows) if self.masked else None

    def reference(self):
        _, batch, mask = self.inputs()
        return reference(self.params(), batch, mask)


def unsplit(grads: Any) -> Any:
    """Return gradients with the layers stacked, as the reference has them."""
    grads = dict(jax.device_get(grads))
    blocks = grads.pop("blocks")
    stacked = {name: a.reshape(-1, *a.shape[-LAYER[name] :]) for name, a in blocks.items()}
    return {**grads, "layers": stacked}


def largest_error(found, expected):
    """Return the largest difference of any leaf, relative to its largest element."""
    errors = jax.tree.map(
        lambda a, b: float(np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(b))), found, expected
    )
    return max(jax.tree.leaves(errors))
