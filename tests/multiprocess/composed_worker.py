"""One rank of a run whose context, stages or layers lie on several processes.

    python composed_worker.py '[["train", {"cases": {"pipe": {"axes": ["pipe"], "pipe": 2}}}]]'

It joins the run that its environment names. Each case prints a line of JSON: its name, and what
came of it.
"""

import hashlib
import pathlib
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "compositions"))

import agreement_worker
import composed_models as models
import composed_plans as plans

import txcore as tx

STEPS = 3


def make_engine(case, axes):
    """Return an engine on two devices along each of `axes`, the first of them over processes."""
    model = case.make_model()
    made = case.make_engine(model)
    names = (*axes, *(name for name in models.AXES if name not in axes))
    sizes = {"data": case.data, "context": case.context, "pipe": case.pipe, "model": case.mp}
    mesh = tx.MeshSpec(jax.devices(), names, tuple(sizes[name] for name in names))
    options = {"optimizer": made.optimizer, "compiler_options": made.compiler_options}
    return tx.Engine(mesh=mesh, plan=made.plan, **options)


def own_rows(batch, engine):
    """Return this process's rows of a global batch: a part where data lies over processes."""
    names = tuple(engine.mesh.shape)
    if names[0] != "data" or engine.mesh.shape["data"] == 1:
        return batch
    rows = models.ROWS // jax.process_count()
    first = jax.process_index() * rows
    return {key: leaf[first : first + rows] for key, leaf in batch.items()}


def train(cases):
    """Train and evaluate under each composition; return what came of each."""
    return {name: train_one(**options) for name, options in cases.items()}


def train_one(axes, **case):
    """Return the losses, the evaluation, and the parameters, whole."""
    case = plans.Case(**case)
    model, engine = case.make_model(), make_engine(case, axes)
    prepare = plans.prepare(model)
    batches = [own_rows(prepare(model.make_batch(i), engine), engine) for i in range(STEPS)]
    losses = []
    state = engine.create_state(model.params)
    step = plans.make_step(model)
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    evaluated = engine.evaluate(plans.make_eval_step(model), state, batches[:2])["loss"]
    report = engine.audit(step, state, batches[0])
    whole = jax.device_put(state.stored_params, NamedSharding(engine.mesh.mesh, P()))
    host = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(whole)]
    return {
        "losses": losses,
        "evaluated": float(evaluated),
        "exact": report.exact,
        "digest": hashlib.sha256(b"".join(leaf.tobytes() for leaf in host)).hexdigest(),
        # Of one rank alone: the others' pipes are read when it has ended.
        "params": [leaf.tolist() for leaf in host] if jax.process_index() == 0 else None,
    }


if __name__ == "__main__":
    agreement_worker.main(globals())
