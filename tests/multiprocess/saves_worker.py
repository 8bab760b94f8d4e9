"""One rank of a run that saves, on whose ranks one fault after the other comes alone.

    python saves_worker.py '[["saves", {"folder": "/tmp/a", "odd": 1}], ...]'

It joins the run that its environment names. Each case prints a line of JSON: its name, and what
came of it on this rank, with the seconds that it took.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import pathlib
import time
from unittest import mock

import agreement_worker as ranks
import jax
import numpy as np
from agreement_worker import batch, engine, outcome, rank, step, toys
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore import _compat
from txcore.train.checkpoints import folder as checkpoint_folder
from txcore.train.checkpoints import manifest, orbax_store, saved_leaves

STEPS, EVERY = 6, 2
checkpoint_folder._SEEN_S = 1.0  # until a folder counts as not shared


class Said(logging.Handler):
    """What txcore logs."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@contextlib.contextmanager
def hearing():
    said, log = Said(), logging.getLogger("txcore")
    log.addHandler(said)
    try:
        yield said.texts
    finally:
        log.removeHandler(said)


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def no_files(*args, **kwargs):
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def no_memory(*args, **kwargs):
    raise MemoryError("std::bad_alloc")


def no_thread(start):
    def refuse(thread):
        if thread.name == "txcore save":
            raise RuntimeError("can't start new thread")
        return start(thread)

    return refuse


def too_large(save):
    """Write, and fail at it once the run goes on."""

    async def async_save(*args, **kwargs):
        parts = await save(*args, **kwargs)
        part = mock.Mock()
        part.result.side_effect = OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        return [*parts, part]

    return async_save


def faults():
    """Return (what is replaced, by what) of each fault, by its name."""
    import threading

    from orbax.checkpoint import StandardCheckpointHandler as Handler

    return {
        "disk full at the manifest": (manifest, "_write_file", full),
        "no more open files": (Handler, "async_save", no_files),
        "file too large": (Handler, "async_save", too_large(Handler.async_save)),
        "no memory": (saved_leaves, "arrays_to_save", no_memory),
        "no thread": (threading.Thread, "start", no_thread(threading.Thread.start)),
        "no room": (checkpoint_folder, "describe_shortage", lambda directory, need: "it is full"),
        "cannot merge": (Handler, "finalize", full),
    }


@functools.cache
def one_engine():
    return engine()  # so that its step is compiled once


def train(folder, **options):
    """Train and save; return the weights."""
    made = one_engine()
    checkpoints = tx.Checkpoints(folder, every=EVERY, keep=9, **options)
    state = made.create_state(toys.params(), ranks.EXTRA)
    data = lambda epoch: (batch(i) for i in range(STEPS))  # noqa: E731
    state = made.fit(step, state, data, steps=STEPS, checkpoints=checkpoints)
    return np.asarray(state.stored_params["w1"]).ravel().tolist()


def timed(run):
    """Run; return how it ended, its seconds, and what was logged."""
    started = time.perf_counter()
    with hearing() as texts:
        found = outcome(run)
    return {**found, "seconds": round(time.perf_counter() - started, 1), "said": texts}


def saves(folder, odd, only=None):
    """Train once for each fault of rank `odd`, and then once without any from where it stands."""
    found = {}
    chosen = {name: fault for name, fault in faults().items() if only is None or name in only}
    for name, (owner, attribute, broken) in chosen.items():
        here = pathlib.Path(folder) / name
        # What process 0 alone does can fail there alone.
        only_first = name in ("disk full at the manifest", "cannot merge")
        own = rank() == (0 if only_first else odd)
        with mock.patch.object(owner, attribute, broken) if own else contextlib.nullcontext():
            found[name] = timed(lambda here=here: train(here))
        found[name]["then"] = timed(lambda here=here: train(here))
        found[name]["left"] = sorted(p.name for p in here.iterdir())
    return found


def restores(folder, odd):
    """Restore, where rank `odd` alone cannot; then all together."""
    own = rank() == odd
    folder = pathlib.Path(folder) / "restores"
    train(folder)
    made = engine()

    def restore(directory=folder):
        checkpoints = tx.Checkpoints(directory, every=EVERY)
        state = made.create_state(toys.params(), ranks.EXTRA)
        try:
            return int(checkpoints.restore(state)[0].step)
        finally:
            checkpoints.close()

    def broken(owner, attribute, error):
        failing = mock.patch.object(owner, attribute, side_effect=error)
        with failing if own else contextlib.nullcontext():
            return restore()

    refused = tx.CheckpointError("float3 cannot be saved")
    elsewhere = folder.with_name("elsewhere" if own else folder.name)
    return {
        "cannot read": timed(lambda: broken(orbax_store.Store, "read", OSError(5, "I/O error"))),
        "cannot save": timed(lambda: broken(saved_leaves, "check_kinds", refused)),
        "a fault": timed(lambda: broken(saved_leaves, "check_kinds", TypeError("unexpected"))),
        "cannot write": timed(
            lambda: broken(checkpoint_folder, "check_shared", OSError(30, "Read-only file system"))
        ),
        "not shared": timed(lambda: restore(elsewhere)),
        "none of these": timed(restore),
        "left": sorted(p.name for p in folder.iterdir()),
    }


@tx.step_fn
def weighted_step(state, batch):
    """Train with weights that all examples share."""
    weights = batch["weights"]
    own = {name: x for name, x in batch.items() if name != "weights"}

    def loss_of(params, batch):
        return toys.local_loss(params, batch) * weights.sum()

    loss, grads = tx.value_and_grad(loss_of)(state.params, own)
    grads, state = state.sync_gradients(grads)
    return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}


def data(odd):
    """Give rank `odd` other values of a leaf that is not split over the ranks."""
    made = engine(plan=tx.Plan(data_parallel=tx.DP("data"), batch={"weights": P()}))
    own = rank() == odd

    def weighted(i, other):
        return {**batch(i), "weights": np.float32([1, 2, 2.5 if other else 3])}

    def run(first, **options):
        batches = [weighted(i, own and i >= first) for i in range(6)]
        state = made.create_state(toys.params())
        made.fit(weighted_step, state, batches, steps=6, **options)

    return {
        "first": timed(lambda: run(0)),
        "later": timed(lambda: run(3, check_replicas_every=2)),
        "equal": timed(lambda: run(9, check_replicas_every=2)),
    }


SETTINGS = {
    "jax_default_matmul_precision": "highest",
    "jax_enable_x64": True,
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_numpy_dtype_promotion": "strict",
    "jax_debug_nans": True,
    "jax_disable_most_optimizations": True,
}
VARIABLES = {
    "fast math": {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"},
    "flags of TPU": {"LIBTPU_INIT_ARGS": "--xla_tpu_enable_something=true"},
    "tf32": {"NVIDIA_TF32_OVERRIDE": "0"},
    "harmless": {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=3 --xla_dump_to=/tmp/dump",
        "JAX_LOG_COMPILES": "0",
    },
}


def surroundings(odd):
    """Give rank `odd` other settings and flags, each in its turn, before a step is compiled."""
    own = rank() == odd
    found = {}

    def run():
        state = engine().create_state(toys.params(), ranks.EXTRA)
        step(state, batch())

    for name, value in SETTINGS.items():
        before = _compat.program_settings()[name]
        if own:
            jax.config.update(name, value)
        found[name] = timed(run)
        jax.config.update(name, before)
    for name, variables in VARIABLES.items():
        with mock.patch.dict(os.environ, variables if own else {}):
            found[name] = timed(run)
    return found


def evaluations(odd):
    """Fail in an evaluation on every rank alike, and go on; then on rank `odd` alone."""

    def fit(fails):
        def evaluate(state):
            if fails:
                raise FloatingPointError("the metric is NaN")
            return {"metric": 1.0}

        made = engine()
        state = made.create_state(toys.params(), ranks.EXTRA)
        given = {"evaluate": evaluate, "eval_every": 2}
        made.fit(step, state, ranks.batches(4), steps=4, **given)

    found = [timed(lambda: fit(True)), timed(lambda: fit(False))]
    print(json.dumps(["alike", found]), flush=True)
    found = timed(lambda: fit(rank() == odd))
    time.sleep(8)  # it has caught its error, and does something else
    return found


if __name__ == "__main__":
    ranks.main(globals())
