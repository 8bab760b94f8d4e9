"""Train MNIST's model under a profile: folder, late rank, delay, steps, then its flags."""

import json
import pathlib
import sys
import time

import jax

sys.path.insert(0, str(pathlib.Path(__file__).parents[3] / "examples" / "mnist"))
import train
from data import feed

import txcore as tx
from txcore.train.engine import Engine


def main(folder, late_rank, delay_s, steps, flags):
    """Run the example; rank `late_rank` sleeps before it gives each batch away."""
    reports = []
    audit, batches = Engine.audit, feed.Feed.train

    def audit_and_keep(self, *args, **options):
        reports.append(audit(self, *args, **options))
        return reports[-1]

    def come_late(self, epoch):
        for batch in batches(self, epoch):
            if jax.process_index() == late_rank:
                time.sleep(delay_s)
            yield batch

    Engine.audit, feed.Feed.train = audit_and_keep, come_late  # type: ignore[method-assign]
    with tx.profile(folder, steps=steps):
        code = train.main(flags)
    if jax.process_index() == 0:
        rows = [(c.op, c.wire_bytes * c.trips) for c in reports[0].collectives]
        print("AUDIT", json.dumps(rows))
    return code


if __name__ == "__main__":
    folder, late, delay, first, last, *flags = sys.argv[1:]
    sys.exit(main(folder, int(late), float(delay), range(int(first), int(last)), flags))
