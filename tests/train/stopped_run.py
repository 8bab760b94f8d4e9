"""One rank of two: train without checkpoints, and have rank 1 get a signal.

python stopped_run.py COORDINATOR RANK WHERE

WHERE: "step", before the fifth batch; "end", in the evaluation after the last step, where both
ranks get it.
"""

import logging
import signal
import sys

import numpy as np
import toys

import txcore as tx


def main(coordinator, rank, where):
    """Run one rank."""
    logging.basicConfig(format="%(message)s")
    tx.initialize(coordinator, 2, rank)
    engine = toys.engine(0, mesh=tx.MeshSpec())

    def data(epoch):
        for i in range(10**6):
            if where == "step" and rank == 1 and i == 5:
                signal.raise_signal(signal.SIGTERM)
            yield {name: np.split(x, 2)[rank] for name, x in toys.batch(seed=i).items()}

    def evaluate(state):
        if where == "end":
            signal.raise_signal(signal.SIGTERM)
        return {}

    steps = {"step": 10**6, "end": 3}[where]
    engine.fit(
        toys.train_step, engine.create_state(toys.params()), data, steps=steps, evaluate=evaluate
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
