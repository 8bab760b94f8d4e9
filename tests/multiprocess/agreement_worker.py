"""One rank of a run whose ranks differ in many ways, one after the other.

    python agreement_worker.py '[["flips", {"runs": 40, "seed": 0}], ...]'

It joins the run that its environment names. Each case prints a line of JSON: its name, and what
came of it. A rank that is refused goes on with the next case.
"""

import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "train"))

import toys

import txcore as tx
from txcore.train.replicas import agreement

EXTRA = {
    "mean": np.float32(0.5),
    "half": np.arange(5, dtype=jnp.bfloat16),
    "seen": np.array([True, False, True]),
    "bytes": np.arange(9, dtype=np.uint8),
    "count": np.arange(3, dtype=np.int32),
    "key": np.array([0, 3], np.uint32),
    "nan": np.array([np.nan, -0.0], np.float32),
}


def rank():
    return jax.process_index()


def engine(**options):
    return tx.Engine(
        **{
            "mesh": tx.MeshSpec(),
            "plan": tx.Plan(data_parallel=tx.DP("data")),
            "optimizer": tx.optim.adamw(0.01),
            **options,
        }
    )


@tx.step_fn
def step(state, batch):
    """Train, and keep a running mean."""

    def loss_of(params, batch):
        return toys.local_loss(state.precision.cast(params), batch)

    loss, grads = tx.value_and_grad(loss_of, loss_scale=state.loss_scale)(state.params, batch)
    grads, state = state.sync_gradients(grads)
    loss = tx.pmean(loss, "data", name="loss")
    extra = {**state.extra, "mean": 0.9 * state.extra["mean"] + 0.1 * loss}
    return state.apply_gradients(grads=grads).replace(extra=extra), {"loss": loss}


@tx.step_fn
def eval_step(state, batch):
    """Return the loss."""
    return {"loss": tx.pmean(toys.local_loss(state.params, batch), "data", name="eval")}


def batch(i=0):
    """Return this process's part of a batch of 16."""
    rows = 16 // jax.process_count()
    whole = toys.batch(16, seed=i)
    return {k: x[rank() * rows : (rank() + 1) * rows] for k, x in whole.items()}


def batches(count, first=0):
    return [batch(first + i) for i in range(count)]


def outcome(run):
    """Run; return how it ended."""
    try:
        return {"ok": run()}
    except Exception as error:  # what is refused is told by the test
        return {"error": type(error).__name__, "text": str(error)}


def flipped(leaf, bit):
    """Return an array like `leaf` whose copies on this process differ in one bit of its memory."""
    host = np.array(leaf)
    host.reshape(-1).view(np.uint8)[bit // 8] ^= np.uint8(1 << bit % 8)
    return jax.make_array_from_process_local_data(leaf.sharding, host, host.shape)


def flips(runs, seed):
    """Flip a random bit of a random leaf on one rank before a run, so many times."""
    rng = np.random.default_rng(seed)
    found = []
    made = engine(precision="float16")
    for _ in range(runs):
        state = made.create_state(toys.params(), EXTRA)
        leaves, treedef = jax.tree_util.tree_flatten_with_path(state.arrays)
        values = [leaf for _, leaf in leaves]
        sizes = [8 * leaf.nbytes for leaf in values]
        odd, which = int(rng.integers(jax.process_count())), int(rng.integers(len(values)))
        bit = int(rng.integers(sizes[which]))
        if values[which].dtype == bool:
            bit -= bit % 8  # the others are no part of its value
        if rank() == odd:
            values[which] = flipped(values[which], bit)
        state = state.replace(**jax.tree.unflatten(treedef, values))
        (field, *rest), _ = leaves[which]
        result = outcome(lambda state=state: step(state, batch()) and None)
        found.append(
            {"leaf": field.key + jax.tree_util.keystr(tuple(rest)), "odd": odd, "bit": bit} | result
        )
    return found


def beginnings():
    """Begin with another state on rank 1, by each of create_state's ways; and with the same one."""
    shift = {"w1": toys.params()["w1"] + rank(), "w2": toys.params()["w2"]}
    plain = engine()

    def init(params):
        moments = tx.optim.adamw(0.01).init(params)
        return jax.tree.map(lambda x: x + rank(), moments)

    odd_moments = tx.optim.Optimizer(init, tx.optim.adamw(0.01).update)
    wider = {"w1": np.zeros((4, 8 + 8 * rank()), np.float32), "w2": toys.params()["w2"]}

    def one(made, params=None, **options):
        state = made.create_state(toys.params() if params is None else params, EXTRA, **options)
        state, _ = step(state, batch())
        return np.asarray(state.stored_params["w1"]).ravel()[:2].tolist()

    return {
        "equal": outcome(lambda: one(plain)),
        "params": outcome(lambda: one(plain, shift)),
        "seed": outcome(lambda: one(engine(seed=rank()))),
        "moments": outcome(lambda: one(engine(optimizer=odd_moments))),
        "sent": outcome(lambda: one(plain, shift, broadcast_from=0)),
        "sent from 1": outcome(lambda: one(plain, shift, broadcast_from=1)),
        "sent seed": outcome(lambda: one(engine(seed=rank()), broadcast_from=0)),
        "sent moments": outcome(lambda: one(engine(optimizer=odd_moments), broadcast_from=0)),
        "sent wider": outcome(lambda: one(plain, wider, broadcast_from=0)),
        "sent by two": outcome(lambda: one(plain, broadcast_from=rank())),
        "no rank": outcome(lambda: one(plain, broadcast_from=2)),
    }


def bits():
    """Send odd bits from rank 1; return them as they arrive, in hexadecimal."""
    words = np.array([0x7FC12345, 0xFFC00001, 0x7F800001, 0x80000000], np.uint32)
    own = words if rank() == 1 else 0 * words
    extra = {
        "float32": own.view(np.float32),
        "bfloat16": (own >> 16).astype(np.uint16).view(jnp.bfloat16),
        "bool": own > 2**31,
        "int8": (own >> 24).astype(np.int8),
        "key": own[:2],
    }
    state = engine().create_state(toys.params(), extra, broadcast_from=1)
    report = engine().audit_broadcast
    made = engine()
    report = made.audit_broadcast(made.create_state(toys.params(), extra), broadcast_from=1)
    return {
        "report": [report.ok, report.exact],
        **{name: [str(x.dtype), np.asarray(x).tobytes().hex()] for name, x in state.extra.items()},
    }


def later():
    """Change a state by hand in the middle of a run, and a copy's memory in the middle of fit."""
    made = engine()
    state = made.create_state(toys.params(), EXTRA)
    state, _ = step(state, batch())
    extra = {**state.extra, "mean": np.float32(rank())}
    found = {
        "by hand": outcome(lambda: step(state.replace(extra=extra), batch()) and None),
        "evaluated": outcome(
            lambda: made.evaluate(eval_step, state.replace(extra=extra), [batch()])
        ),
        "copied": outcome(lambda: step(jax.tree.map(jnp.copy, state), batch()) and None),
    }
    seen = []

    def damage(state):
        seen.append(int(state.step))
        if len(seen) == 5 and rank() == 1:
            state.stored_params["w1"] = flipped(state.stored_params["w1"], 7)
        return {}

    found["in fit"] = outcome(
        lambda: (
            made.fit(
                step,
                made.create_state(toys.params(), EXTRA),
                batches(8),
                steps=8,
                evaluate=damage,
                eval_every=1,
                check_replicas_every=3,
            )
            and None
        )
    )
    return found


def arguments(directory):
    """Give fit another argument on rank 1, each in its turn."""
    own = rank() == 1

    def evaluate(state):
        return {"loss": 0.0}

    def saving(**options):
        given = {"every": 2, "keep": 3, "resume": "auto", **options}
        where = given.pop("directory", "same")
        return tx.Checkpoints(pathlib.Path(directory) / where, **given)

    def one(engine_options=None, data=None, **options):
        made = engine(**(engine_options or {}))
        state = made.create_state(toys.params(), EXTRA)
        given = {"steps": 2, **options}
        if given.get("epochs"):
            del given["steps"]
        made.fit(step, state, data or batches(2), **given)

    pairs = {
        "equal": {},
        "steps": {"steps": 3 if own else 2},
        "epochs": {"epochs": 2 if own else 1},
        "steps or epochs": {"epochs": 1} if own else {"steps": 2},
        "data": {"data": batches(3 if own else 2)},
        "kind of data": {"data": (lambda epoch: iter(batches(2))) if own else batches(2)},
        "evaluate": {"evaluate": evaluate if own else None},
        "eval_every": {"evaluate": evaluate, "eval_every": 1 if own else 2},
        "check_replicas_every": {"check_replicas_every": 1 if own else 2},
        "checkpoints": {"checkpoints": saving() if own else None},
        "checkpoints every": {"checkpoints": saving(every=1 if own else 2)},
        "checkpoints keep": {"checkpoints": saving(keep=1 if own else 2)},
        "checkpoints resume": {"checkpoints": saving(resume="never" if own else "auto")},
        "checkpoints directory": {"checkpoints": saving(directory="a" if own else "b")},
        "precision": {"engine_options": {"precision": "bfloat16" if own else "float32"}},
        "on_nonfinite": {"engine_options": {"on_nonfinite": "ignore" if own else "stop"}},
        "optimizer": {
            "engine_options": {"optimizer": (tx.optim.sgd if own else tx.optim.adamw)(0.1)}
        },
        "rate": {"engine_options": {"optimizer": tx.optim.sgd(0.2 if own else 0.1)}},
        "loggers": {"engine_options": {"loggers": [tx.loggers.Basic()] if own else []}},
        "compiler_options": {
            "engine_options": {"compiler_options": {"xla_cpu_enable_fast_math": own}}
        },
    }
    found = {}
    for name, options in pairs.items():
        started = time.perf_counter()
        found[name] = outcome(lambda options=options: one(**options))
        found[name]["seconds"] = time.perf_counter() - started
    return found


def alone(what):
    """Train, and do something on rank 1 alone; this does not return where that is found."""
    own = rank() == 1
    made = engine()
    state = made.create_state(toys.params(), EXTRA)
    data = batches(6)

    def evaluate(state):
        if what == "run in evaluation" and own:
            step(jax.tree.map(jnp.copy, state), batch())
        if what == "evaluation in evaluation" and own:
            made.evaluate(eval_step, state, batches(1))
        more = what == "longer evaluation" and own
        return made.evaluate(eval_step, state, batches(2 + more))

    options = {"steps": 6, "evaluate": evaluate}
    if what == "epoch that ends early":
        data, options = (lambda epoch: iter(batches(4 if own else 6))), {"epochs": 1}
    if what == "epochs of other lengths":
        data, options = (lambda epoch: iter(batches(4 if own else 6))), {"steps": 12}
    if what == "barrier in data":
        data = lambda epoch: (say(i, own) for i in range(6))  # noqa: E731

        def say(i, own):
            if i == 3 and own:
                tx.barrier("one rank alone")
            return batch(i)

    if what == "slow":
        data = lambda epoch: (rest(i) for i in range(6))  # noqa: E731

        def rest(i):
            time.sleep(45 if i == 3 and own else 0)
            return batch(i)

    state = made.fit(step, state, data, **options)
    print(json.dumps(["alone", f"after fit at {time.time():.1f}"]), flush=True)
    if what == "run after fit" and own:
        state, metrics = step(state, batch())
        float(metrics["loss"])
    if what == "evaluation after fit" and own:
        made.evaluate(eval_step, state, batches(1))
    if what == "barrier after fit" and own:
        tx.barrier("one rank alone")
    if what == "second fit" and own:
        made.fit(step, state, batches(2), steps=2)
    if what == "run before a barrier":
        if own:
            float(step(state, batch())[1]["loss"])
        tx.barrier("both")
    return "done"


def cost(megabytes, times):
    """Time the comparison of a state of so many megabytes; milliseconds."""
    rows = int(megabytes * 1e6 / 4 / 1000 / 8)
    made = engine(optimizer=tx.optim.sgd(0.1))
    params = {f"w{i}": np.full((rows, 1000), i, np.float32) for i in range(8)}
    state = made.create_state(params)
    seconds = []
    for _ in range(times + 1):
        started = time.perf_counter()
        made.check_replicas(state)
        seconds.append(time.perf_counter() - started)
    whole = []
    for _ in range(times):
        started = time.perf_counter()
        agreement.check_beginning(made._options, state, "step")
        whole.append(time.perf_counter() - started)
    ms = [1000 * x for x in (seconds[0], min(seconds[1:]), statistics.median(seconds[1:]))]
    return {
        "first": ms[0],
        "copies": ms[1:],
        "beginning": [1000 * min(whole), 1000 * statistics.median(whole)],
    }


def main(cases):
    """Run the cases that the command line names; print what came of each."""
    tx.initialize()
    for name, options in json.loads(sys.argv[1]):
        print(json.dumps([name, cases[name](**options)]), flush=True)


if __name__ == "__main__":
    main(globals())
