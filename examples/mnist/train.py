"""Train on MNIST with explicit collectives, and prove which ones the compiled step contains.

    python examples/mnist/train.py --model cnn --devices 2

One device, several devices in one process, several processes: README.md. The flags are in cli.py.
"""

import results  # before jax: it notes when the script started

# isort: split
import argparse
import sys
from collections.abc import Callable
from typing import Any

import agreement
import cli
import jax
import jax.numpy as jnp
import models
from data.dataset import load
from data.feed import Feed, take_rows

import txcore as tx
from txcore import kernels, launch


def make_steps(
    layers: tuple[models.Layer, ...], label_smoothing: float = 0.0, microbatches: int | None = None
) -> tuple[Any, Callable[..., Any]]:
    """Return the training step and the evaluation step of a model, for every plan."""

    def forward(state: tx.TrainState, params: Any, batch: Any, keys: Any = None) -> jax.Array:
        cast, tensor = state.precision.cast, state.engine.plan.tensor_parallel
        axis = None if tensor is None else tensor.axis
        return models.apply(layers, cast(params), cast(batch["image"]), keys, axis)

    @tx.step_fn
    def train_step(state: tx.TrainState, batch: Any) -> Any:
        batch = take_rows(batch)
        keys = state.example_keys(batch) if models.uses_dropout(layers) else None

        def loss_of(params: Any, batch: Any, keys: Any) -> jax.Array:
            logits = forward(state, params, batch, keys)
            losses = kernels.cross_entropy(logits, batch["label"], label_smoothing=label_smoothing)
            return jnp.mean(losses * batch["weight"])

        scale = state.loss_scale
        both = tx.value_and_grad(loss_of, loss_scale=scale, microbatches=microbatches)
        loss, grads = both(state.params, batch, keys)
        grads, state = state.sync_gradients(grads)
        metrics = {"loss": tx.pmean(loss, "data", name="loss")}
        if scale is not None:  # float16
            metrics["loss_scale"] = scale
        return state.apply_gradients(grads=grads), metrics

    def eval_step(state: tx.TrainState, batch: Any) -> Any:
        batch = take_rows(batch)
        right = jnp.argmax(forward(state, state.params, batch), axis=-1) == batch["label"]
        accuracy = jnp.mean(right.astype(jnp.float32) * batch["weight"])
        return {"test_accuracy": tx.pmean(accuracy, "data", name="test_accuracy")}

    return train_step, eval_step


def train(args: argparse.Namespace) -> int:
    """Run the training, and return the exit code: 1 if the proof failed."""
    # ---- Meet the other processes, and refuse what does not fit ----------------------------------
    tx.initialize(args.coordinator, args.num_processes, args.process_id)
    agreement.check_arguments(args)  # before one rank refuses its own, and the others wait
    cli.check(args)
    checkpoints = cli.make_checkpoints(args)
    layers = models.layers_of(args.model, args.dropout)
    mesh = cli.choose_mesh(args, launch.world_size())
    rank, processes = jax.process_index(), jax.process_count()

    # ---- Load the data: the same on every process ------------------------------------------------
    dataset = load(args.dataset, args.data_dir, rank=rank, barrier=tx.barrier, agree=cli.agree)
    agreement.check_data(dataset)
    shares = (mesh.shape["data"], rank, processes)
    feed = Feed(dataset, args.batch_size, shares, seed=args.seed, train_size=args.train_size)
    steps = cli.count_steps(args, dataset.name, feed.steps_per_epoch)

    # ---- Say what is parallel, and how to train --------------------------------------------------
    history = results.History()
    engine = tx.Engine(
        mesh=mesh,
        plan=cli.make_plan(args, layers, mesh, feed.hold_on(mesh)),
        optimizer=cli.make_optimizer(args, steps),
        loggers=[tx.loggers.Basic(unit="images"), history, *cli.make_loggers(args)],
        precision=args.precision,
        seed=args.seed,
        on_nonfinite=args.on_nonfinite,
    )
    cli.say(
        f"{args.model} on {dataset.name}: {mesh.size} x {mesh.devices[0].device_kind}, "
        f"{processes} process(es), global batch {args.batch_size}, {args.precision}"
    )

    # ---- Train, evaluate, save -------------------------------------------------------------------
    train_step, eval_step = make_steps(layers, args.label_smoothing, args.accumulate)
    state = engine.fit(
        train_step,
        engine.create_state(models.init(layers, args.seed)),
        feed.train,
        steps=steps,
        evaluate=lambda state: engine.evaluate(eval_step, state, feed.test()),
        eval_every=args.eval_every or feed.steps_per_epoch,
        checkpoints=checkpoints,
    )

    # ---- Prove what the compiled step sends, and say how it went ---------------------------------
    report = engine.audit(train_step, state, next(iter(feed.train(0)))) if args.audit else None
    cli.say_loss_scale(state)
    if rank == 0:
        results.write(args.results, history, report)
        results.draw(args.plot, history, f"{args.model} on {dataset.name}, {mesh.size} device(s)")
    if history.test_accuracy is not None:
        cli.say(f"test accuracy {100 * history.test_accuracy:.2f}% on {dataset.name}")
    if report is not None:
        cli.say(str(report))
    return 0 if report is None or report.ok else 1


def main(argv: list[str] | None = None) -> int:
    """Run the script; an error that the user can mend is one line."""
    return cli.run(train, argv)


if __name__ == "__main__":
    sys.exit(main())
