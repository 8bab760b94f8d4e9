"""The MNIST example's step, run by txcore's engine."""

import jax
import models
import numpy as np
import train
import worker

import txcore as tx
from txcore import launch
from txcore.train.batches.placer import shard_batch


def main() -> None:
    """Serve steps."""
    args = worker.parse_arguments()
    if args.processes > 1:
        tx.initialize(f"127.0.0.1:{args.ports[0]}", args.processes, args.rank)
    else:
        launch.simulate_cpu_devices(args.devices)
    engine = tx.Engine(
        mesh=tx.MeshSpec(jax.devices()),
        plan=tx.Plan(data_parallel=tx.DP("data")),
        optimizer=tx.optim.sgd(worker.LEARNING_RATE, momentum=worker.MOMENTUM),
        precision=args.precision,
    )
    train_step, _ = train.make_steps(models.layers_of("cnn3x3", dropout=0))
    params: dict[str, dict[str, np.ndarray]] = {}
    for key, value in worker.load_weights(args.weights).items():
        layer, name = key.split("/")
        params.setdefault(layer, {})[name] = value
    state = engine.create_state(params)

    def place_batch(image: np.ndarray, label: np.ndarray):
        ones = np.ones(len(label), np.float32)
        batch = {"image": image, "label": label, "mask": ones, "weight": ones}
        return shard_batch(batch, engine.mesh, engine.plan)

    def run_steps(batch):
        nonlocal state
        state, metrics = engine.run(train_step, state, batch)
        return metrics["loss"]

    batches = [place_batch(*pair) for pair in worker.load_batches(args)]
    worker.serve_requests(
        args, run_steps, batches, {"jax": jax.__version__}, ahead=1
    )  # as fit does on CPU


if __name__ == "__main__":
    main()
