"""Train a small GPT on text under any plan, and prove what its compiled step sends.

    python examples/gpt_small/train.py --mesh data=2,model=2,pipe=2 --microbatches 4

The flags are in cli.py.
"""

import argparse
import sys
from typing import Any

import cli
import data
import jax
import model
import sample

import txcore as tx
from txcore.launch import world_size
from txcore.train.batches.batch import count_parts


def make_steps(config: model.GPT) -> tuple[Any, Any]:
    """Return the training step and the evaluation step of a model, the same under every plan."""

    @tx.step_fn
    def train_step(state: tx.TrainState, batch: Any) -> Any:
        stages = model.functions(config, state.precision.cast)
        both = tx.pipeline.value_and_grad(*stages, loss_scale=state.loss_scale)
        loss, grads = both(state.params, batch)
        grads, state = state.sync_gradients(grads)
        state = state.apply_gradients(grads=grads)
        return state, {"loss": tx.pmean(loss, model.DATA_AXES, name="loss")}

    def eval_step(state: tx.TrainState, batch: Any) -> Any:
        stages = model.functions(config, state.precision.cast)
        loss = tx.pipeline.evaluate(*stages)(state.params, batch, batch["mask"])
        return {"test_loss": tx.pmean(loss, model.DATA_AXES, name="test_loss")}

    return train_step, eval_step


def train(args: argparse.Namespace) -> int:
    """Run the training, and return the exit code: 1 if the proof failed."""
    # ---- Meet the other processes, and say what is parallel --------------------------------------
    tx.initialize(args.coordinator, args.num_processes, args.process_id)
    sizes = cli.read_mesh(args.mesh)
    mesh = cli.make_mesh(sizes, world_size())
    config = cli.make_config(args, data.VOCABULARY)
    config.check(sizes)
    plan = cli.make_plan(args, config)

    # ---- Load the text: the same on every process ------------------------------------------------
    name, text = data.load(args.text)
    train_text, test_text = data.split(text, config.length, args.batch_size)
    rows = jax.sharding.NamedSharding(mesh.mesh, jax.sharding.PartitionSpec("data"))
    parts = count_parts(rows)  # processes that have other rows
    own = jax.process_index() * parts // jax.process_count()
    windows = data.Windows(args.batch_size, config.length, sizes["context"], (parts, own))
    bigram = data.bigram_loss(train_text, test_text)

    # ---- Train, evaluate, save -------------------------------------------------------------------
    history = cli.History()
    engine = tx.Engine(
        mesh=mesh,
        plan=plan,
        optimizer=cli.make_optimizer(args),
        loggers=[tx.loggers.Basic(unit="sequences"), history],
        precision=args.precision,
        seed=args.seed,
    )
    params = model.init(config, args.seed)
    cli.say(f"{config}\n{len(text):,} bytes of {name}\n")
    cli.say(str(plan.describe(params, mesh, optimizer=engine.optimizer)))
    train_step, eval_step = make_steps(config)
    state = engine.fit(
        train_step,
        engine.create_state(params),
        lambda epoch: windows.shuffled(train_text, epoch, args.seed),
        steps=args.steps,
        evaluate=lambda state: engine.evaluate(eval_step, state, windows.in_order(test_text)),
        eval_every=args.eval_every,
        checkpoints=cli.make_checkpoints(args),
    )

    # ---- Prove what the compiled step sends, and say how it went ---------------------------------
    report = None
    if args.audit:
        report = engine.audit(train_step, state, next(windows.shuffled(train_text, 0, args.seed)))
        cli.say(str(report))
    if history.end is not None and history.end.examples_per_second:
        cli.say(f"{history.end.examples_per_second * config.length:,.0f} tokens/s")
    if history.test_loss is not None:
        cli.say(f"test loss {history.test_loss:.3f} nats a byte; a bigram model's {bigram:.3f}")
    if args.sample:
        whole = sample.gather(state.stored_params, mesh)
        prompt = test_text[: config.length // 2]
        drawn = sample.draw(config, whole, prompt, args.sample, args.seed)
        cli.say(f"drawn after {prompt[-40:].tobytes()!r}:\n{drawn}")
    status = None if report is None else report.status
    history.write(args.results, bigram_loss=bigram, mesh=sizes, audit=status)
    return 0 if report is None or report.ok else 1


def main(argv: list[str] | None = None) -> int:
    """Run the script; an error that the user can mend is one line."""
    return cli.run(train, argv)


if __name__ == "__main__":
    sys.exit(main())
