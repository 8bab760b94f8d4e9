"""Compile the training step for many ranks that are not here. Started by experiments.py."""

import json
import os
import pathlib
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the compilers' plugins would look for devices
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import models
import numpy as np
from train import make_steps

import txcore as tx
from txcore.profiling.costs import Costs

# The targets of so many ranks: hosts x GPUs, and slices of a TPU.
GPUS = {1: "1", 8: "8", 64: "8x8", 512: "64x8"}
SLICES = {1: "1x1x1", 8: "2x2x2", 64: "4x4x4", 512: "8x8x8"}
NEEDS = {"cuda": "gpu-target", "tpu": "tpu-target"}


def name_targets(ranks: int) -> list[str]:
    """Return the machines of so many ranks that jax's compilers know.

    Example:
      >>> name_targets(64)
      ['cuda:h100:8x8', 'tpu:v5p:4x4x4']
    """
    return [
        *([f"cuda:h100:{GPUS[ranks]}"] if ranks in GPUS else []),
        *([f"tpu:v5p:{SLICES[ranks]}"] if ranks in SLICES else []),
    ]


def count_costs(asked: dict[str, Any], target: str, ranks: int, batch_size: int) -> Costs:
    """Return the costs of the step on a target, with `batch_size` examples on each device."""
    layers = models.layers_of(asked["model"])
    engine = tx.Engine(
        mesh=tx.MeshSpec(jax.devices("cpu")[:1]),
        plan=tx.Plan(data_parallel=tx.DP("data")),
        optimizer=tx.optim.sgd(asked["learning_rate"], momentum=0.9),
    )
    state = engine.create_state(models.init(layers, asked["seed"]))
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, 28, 28, 1), np.float32),
        "label": jax.ShapeDtypeStruct((batch_size,), np.int32),
        "mask": jax.ShapeDtypeStruct((batch_size,), np.float32),
        "weight": jax.ShapeDtypeStruct((batch_size,), np.float32),
    }
    step, _ = make_steps(layers)
    return engine.costs(step, state, batch, target=target, mesh={"data": ranks})


def predict(asked: dict[str, Any], target: str, ranks: int) -> dict[str, Any]:
    """Return a row: what the step takes on a target by its data sheet, or why it is left out."""
    whole, row = asked["batch_size"], {"target": target, "ranks": ranks}
    try:
        row["weak_step_seconds"] = count_costs(asked, target, ranks, whole).schedule.seconds
        if not whole % ranks:
            part = count_costs(asked, target, ranks, whole // ranks)
            row["strong_step_seconds"] = part.schedule.seconds
    except (ImportError, RuntimeError) as error:
        extra = NEEDS[target.partition(":")[0]]
        why = str(error).partition("\n")[0]
        row["left_out"] = f"its compiler is not here (the extra {extra}): {why}"
    return row


def main() -> None:
    """Compile for the ranks that the first argument names; write what was found."""
    asked = json.loads(sys.argv[1])
    found: dict[str, Any] = {"programs": {}, "predicted": []}
    for ranks in asked["ranks"]:
        totals = count_costs(asked, f"cpu:{ranks}", ranks, asked["batch_size"]).totals
        found["programs"][ranks] = {
            "payload_bytes": sum(total.payload_bytes for total in totals),
            "calls": sum(total.calls for total in totals),
        }
    for ranks in (1, *asked["ranks"]):
        found["predicted"] += [predict(asked, target, ranks) for target in name_targets(ranks)]
    pathlib.Path(asked["out"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
