"""Train on MNIST with explicit collectives, and prove which ones the compiled step contains.

    python examples/mnist/train.py --model cnn --devices 2

One device, several devices in one process, several processes by `txcore launch`, SLURM or mpirun
(found by themselves), or by hand:

    python examples/mnist/train.py --coordinator 127.0.0.1:12345 --num-processes 2 --process-id 0
    python examples/mnist/train.py --coordinator 127.0.0.1:12345 --num-processes 2 --process-id 1
"""

import argparse
import json
import logging
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

STARTED = time.perf_counter()

import agreement  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import models  # noqa: E402
from data.batches import batches_per_epoch, epoch_batches  # noqa: E402
from data.dataset import NAMES, Dataset, load  # noqa: E402

import txcore as tx  # noqa: E402
from txcore import kernels, launch  # noqa: E402
from txcore.launch import watch  # noqa: E402
from txcore.train.numerics import nonfinite  # noqa: E402

EVAL_BATCH = 1024
BASE_BATCH = 64  # the batch to which --lr-scaling linear refers
EPOCHS = {"mnist": 3, "digits": 20}
LEARNING_RATES = {"sgd": 0.02, "adamw": 1e-3}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--model", default="cnn", choices=list(models.MODELS))
    add("--dropout", type=float, help="replaces the model's dropout rates; 0 leaves them out")
    add("--devices", default="all", help="1, N or all; simulates CPU devices where needed")
    add("--batch-size", type=int, default=128, help="of the global batch")
    add("--learning-rate", type=float, help="default: 0.02 for sgd, 0.001 for adamw")
    add("--optimizer", default="sgd", choices=list(LEARNING_RATES), help="sgd has momentum 0.9")
    add("--lr-scaling", default="none", choices=["none", "linear"], help="rate x batch / 64")
    add("--warmup", type=int, default=100, help="steps of linear warm-up; default: 100")
    add("--decay", default="none", choices=["none", "cosine"], help="cosine: to 0 at the end")
    add("--label-smoothing", type=float, default=0.0, help="from 0 to 1; default: 0")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int)
    length.add_argument("--epochs", type=int, help="default: 3 of MNIST, 20 of the few digits")
    add("--eval-every", type=int, help="steps between evaluations; default: an epoch")
    add("--precision", default="float32", choices=["float32", "bfloat16", "float16"])
    add("--seed", type=int, default=0)
    add("--dataset", default="auto", choices=NAMES)
    add(
        "--data-dir",
        help="folder of the MNIST files, or mnist.npz; default: TXCORE_DATA, or data/mnist",
    )
    add("--train-size", type=int, help="train on the first N examples only")
    add("--log-dir", help="write DIR/train.jsonl")
    add("--results", help="write a JSON file")
    add("--checkpoint-dir", help="save the run there, and resume it from there")
    add("--save-every", type=int, help="steps between checkpoints; default: 100")
    add("--keep", type=int, help="how many checkpoints to keep; default: 3")
    add("--resume", choices=["auto", "never", "must"], help="default: auto")
    add("--on-nonfinite", default="stop", choices=["stop", "skip", "ignore"], help="a NaN loss")
    add("--audit", default=True, action=argparse.BooleanOptionalAction)
    add("--coordinator", help="host:port of process 0, for processes started by hand")
    add("--num-processes", type=int)
    add("--process-id", type=int)
    return parser.parse_args(argv)


def choose_devices(wanted: str, num_processes: int) -> list[Any]:
    """Return the devices to train on; simulate CPU devices where there are fewer real ones."""
    if wanted == "all":
        return jax.devices()
    if not wanted.isdigit() or int(wanted) < 1:
        raise ValueError(f"--devices must be a number from 1 on, or all, got {wanted!r}")
    count = int(wanted)
    if count % num_processes:
        raise ValueError(
            f"--devices {count} cannot be shared equally by {num_processes} processes: use a "
            f"multiple of {num_processes}"
        )
    local = count // num_processes
    if not launch.backend_started():
        launch.simulate_cpu_devices(local)
    devices = jax.devices() if jax.device_count() >= count else jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(f"--devices {count}: this jax has started with {len(devices)} devices")
    if devices[0].platform == "cpu" and local > 1:
        say(f"simulating {local} CPU devices" + (" a process" if num_processes > 1 else ""))
    return devices[:count]


def check(args: argparse.Namespace) -> None:
    """Refuse what is out of range before anything is loaded, and expand ~ in paths."""
    for name, low in (("steps", 0), ("epochs", 0), ("warmup", 0), ("eval_every", 1)):
        value = getattr(args, name)
        if value is not None and value < low:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be a count from {low} on, got {value}")
    if args.learning_rate is not None and not args.learning_rate >= 0:
        raise ValueError(f"--learning-rate must be a number from 0 on, got {args.learning_rate}")
    if not 0 <= args.label_smoothing <= 1:
        raise ValueError(
            f"--label-smoothing must be a number from 0 to 1, got {args.label_smoothing}"
        )
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to {2**32 - 1}, got {args.seed}")
    for name in ("data_dir", "log_dir", "results", "checkpoint_dir"):
        path = os.path.expanduser(getattr(args, name) or "")  # shells leave --results=~/x as it is
        if path.startswith("~"):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} needs a path, but {path!r} is no user's here: write it out")
        setattr(args, name, path or None)
    if args.data_dir and args.dataset == "digits":
        raise ValueError(
            "--data-dir is for MNIST, but --dataset digits takes scikit-learn's: leave one out"
        )
    if args.results:
        # Now, and not after an hour of training.
        pathlib.Path(args.results).parent.mkdir(parents=True, exist_ok=True)


def say(text: str) -> None:
    """Print on rank 0."""
    if jax.process_index() == 0:
        print(text, flush=True)


def make_steps(
    layers: tuple[models.Layer, ...], label_smoothing: float = 0.0
) -> tuple[Any, Callable[..., Any]]:
    """Return the training step and the evaluation step of a model."""

    def forward(state: tx.TrainState, params: Any, batch: Any, keys: Any = None) -> jax.Array:
        cast = state.precision.cast
        return models.apply(layers, cast(params), cast(batch["image"]), keys)

    @tx.step_fn
    def train_step(state: tx.TrainState, batch: Any) -> Any:
        keys = state.example_keys(batch) if models.uses_dropout(layers) else None

        def loss_of(params: Any) -> jax.Array:
            logits = forward(state, params, batch, keys)
            losses = kernels.cross_entropy(logits, batch["label"], label_smoothing=label_smoothing)
            return jnp.mean(losses * batch["weight"])

        loss, grads = tx.value_and_grad(loss_of, loss_scale=state.loss_scale)(state.params)
        grads, state = state.sync_gradients(grads)
        state = state.apply_gradients(grads=grads)
        metrics = {"loss": tx.pmean(loss, "data", name="loss")}
        if state.loss_scale is not None:  # float16
            metrics["loss_scale"] = state.loss_scale
        return state, metrics

    def eval_step(state: tx.TrainState, batch: Any) -> Any:
        logits = forward(state, state.params, batch)
        right = (jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32)
        accuracy = jnp.mean(right * batch["weight"])
        return {"test_accuracy": tx.pmean(accuracy, "data", name="test_accuracy")}

    return train_step, eval_step


def make_optimizer(args: argparse.Namespace, steps: int) -> tx.optim.Optimizer:
    """Return the optimizer with its learning rate, scaled, warmed up and decayed as asked for."""
    rate = LEARNING_RATES[args.optimizer] if args.learning_rate is None else args.learning_rate
    if args.lr_scaling == "linear":
        rate = tx.optim.linear_scaling(rate, args.batch_size, BASE_BATCH)
    schedule = tx.optim.warmup(rate, args.warmup) if args.warmup else rate
    if args.decay == "cosine":
        if args.warmup >= steps:
            raise ValueError(
                f"--decay cosine needs more steps than the warm-up's {args.warmup}, got {steps}: "
                "train longer, or make --warmup shorter"
            )
        schedule = tx.optim.cosine(rate, steps, args.warmup)
    if args.optimizer == "adamw":
        return tx.optim.adamw(schedule)
    return tx.optim.sgd(schedule, momentum=0.9)


class Data:
    """The batches of this process: the same global order for any number of devices."""

    def __init__(self, data: Dataset, args: argparse.Namespace, device_count: int) -> None:
        self._data, self._args = data, args
        size = len(data.train_labels) if args.train_size is None else args.train_size
        if not 1 <= size <= len(data.train_labels):
            raise ValueError(
                f"--train-size must be from 1 to {len(data.train_labels)}, got {args.train_size}"
            )
        if args.batch_size < 1 or args.batch_size % device_count:
            raise ValueError(
                f"--batch-size {args.batch_size} cannot be shared equally by {device_count} "
                f"devices: use a positive multiple of {device_count}"
            )
        self._size = size
        self.steps_per_epoch = batches_per_epoch(size, args.batch_size)
        self._eval_batch = -(-EVAL_BATCH // device_count) * device_count
        self._part = {"process_index": jax.process_index(), "process_count": jax.process_count()}

    def train(self, epoch: int) -> Iterable[Any]:
        """Return the batches of one epoch."""
        images, labels = self._data.train_images, self._data.train_labels
        return epoch_batches(
            images[: self._size],
            labels[: self._size],
            batch_size=self._args.batch_size,
            seed=self._args.seed,
            epoch=epoch,
            **self._part,
        )

    def test(self) -> Iterable[Any]:
        """Return the test set in order."""
        return epoch_batches(
            self._data.test_images,
            self._data.test_labels,
            batch_size=self._eval_batch,
            seed=0,
            epoch=0,
            shuffle=False,
            **self._part,
        )


def make_checkpoints(args: argparse.Namespace) -> tx.Checkpoints | None:
    """Return where the run is saved, if it is."""
    names = ("save_every", "keep", "resume")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.checkpoint_dir is not None:
        every = given.pop("save_every", 100)
        return tx.Checkpoints(args.checkpoint_dir, every=every, **given)
    for name in given:
        flag = name.replace("_", "-")
        raise ValueError(f"--{flag} needs --checkpoint-dir: without it nothing is saved")
    return None


class History:
    """A logger that keeps what --results writes."""

    def __init__(self) -> None:
        self.loss_curve: list[float] = []
        self.first_step: int | None = None  # of the curve; later than 1 where the run was resumed
        self.test_accuracy: float | None = None
        self.seconds_to_99: float | None = None
        self.end: tx.loggers.Record | None = None

    def __call__(self, record: tx.loggers.Record) -> None:
        """Keep a record."""
        match record.kind:
            case "step":
                self.first_step = self.first_step or record.step
                self.loss_curve.append(record.metrics["loss"])
            case "eval":
                self.test_accuracy = record.metrics["test_accuracy"]
                if self.seconds_to_99 is None and record.metrics["test_accuracy"] >= 0.99:
                    self.seconds_to_99 = seconds_since_start()
            case "end":
                self.end = record


def seconds_since_start() -> float:
    """Return this process's age; where the system does not tell it, the script's."""
    try:
        ticks = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(pathlib.Path("/proc/uptime").read_text().split()[0])
        return uptime - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.perf_counter() - STARTED


def train(args: argparse.Namespace) -> int:
    """Run the training, and return the exit code: 1 if the proof failed."""
    tx.initialize(args.coordinator, args.num_processes, args.process_id)
    agreement.check_arguments(args)  # before one rank refuses its own, and the others wait
    check(args)
    checkpoints = make_checkpoints(args)
    layers = models.layers_of(args.model, args.dropout)
    devices = choose_devices(args.devices, launch.world_size())
    dataset = load(
        args.dataset,
        args.data_dir,
        rank=jax.process_index(),
        barrier=tx.barrier,
        agree=lambda own: launch.share("dataset", own),
    )
    agreement.check_data(dataset)
    data = Data(dataset, args, len(devices))
    steps = args.steps
    if steps is None:
        epochs = EPOCHS[dataset.name] if args.epochs is None else args.epochs
        steps = epochs * data.steps_per_epoch
    history = History()
    loggers: list[tx.loggers.Logger] = [tx.loggers.Basic(unit="images"), history]
    if args.log_dir:
        log = pathlib.Path(args.log_dir) / "train.jsonl"
        if jax.process_index() == 0:  # a logger that fails later does not end the run
            log.parent.mkdir(parents=True, exist_ok=True)
            log.touch()
        loggers.append(tx.loggers.JSONL(log))
    engine = tx.Engine(
        mesh=tx.MeshSpec(devices=devices, axes=("data",)),
        plan=tx.Plan(data_parallel=tx.DP(axis="data")),
        optimizer=make_optimizer(args, steps),
        loggers=loggers,
        precision=args.precision,
        seed=args.seed,
        on_nonfinite=args.on_nonfinite,
    )
    say(
        f"{args.model} on {dataset.name}: {len(devices)} x {devices[0].device_kind}, "
        f"{jax.process_count()} process(es), global batch {args.batch_size}, {args.precision}"
    )
    train_step, eval_step = make_steps(layers, args.label_smoothing)
    state = engine.fit(
        train_step,
        engine.create_state(models.init(layers, args.seed)),
        data.train,
        steps=steps,
        evaluate=lambda state: engine.evaluate(eval_step, state, data.test()),
        eval_every=args.eval_every or data.steps_per_epoch,
        checkpoints=checkpoints,
    )
    report = engine.audit(train_step, state, next(iter(data.train(0)))) if args.audit else None
    if state.loss_scaling is not None:
        say(f"loss scale {float(state.loss_scaling.scale):g}; {nonfinite.skipped(state)}")
    if jax.process_index() == 0:
        write_results(args, history, report)
        if history.test_accuracy is not None:
            print(f"test accuracy {100 * history.test_accuracy:.2f}% on {dataset.name}")
        if report is not None:
            print(report)
    return 0 if report is None or report.ok else 1


def write_results(args: argparse.Namespace, history: History, report: Any) -> None:
    """Write what --results asks for."""
    if not args.results:
        return
    end = history.end
    results = {
        "test_accuracy": history.test_accuracy,
        "loss_curve": history.loss_curve,
        "first_step": history.first_step,
        "images_per_second": end.examples_per_second if end else None,
        "compile_seconds": end.compile_seconds if end else None,
        "seconds_to_99": history.seconds_to_99,
        "audit_ok": report.ok if report is not None else None,
        "collectives": report.to_dict()["collectives"] if report is not None else None,
    }
    text = json.dumps(results, indent=1) + "\n"
    pathlib.Path(args.results).write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Run the script; an error that the user can mend is one line."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("txcore").setLevel(logging.INFO)
    args = parse(argv)
    try:
        return train(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        watch.failed(error)  # the other ranks are waiting for this one
        print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
