"""A coordinator in memory, and a clock that is set by hand."""

import threading


class Coordinator:
    """What the watch and the pre-flight use of jax's client, for several ranks of one process."""

    def __init__(self, world=1):
        self.world, self.rows, self.calls = world, {}, 0
        self.down = False
        self.changed = threading.Condition()
        self.at_barrier = {}

    def _called(self):
        self.calls += 1
        if self.down:
            raise RuntimeError("UNAVAILABLE: failed to connect")

    def key_value_set(self, key, value, allow_overwrite=False):
        self._called()
        with self.changed:
            if key in self.rows and not allow_overwrite:
                raise RuntimeError(f"ALREADY_EXISTS: key {key} already exists.")
            self.rows[key] = value
            self.changed.notify_all()

    def key_value_dir_get(self, folder):
        self._called()
        with self.changed:
            return [(k, v) for k, v in self.rows.items() if k.startswith(folder)]

    def blocking_key_value_get(self, key, timeout_in_ms):
        self._called()
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.rows, timeout_in_ms / 1000):
                raise RuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
            return self.rows[key]

    def key_value_delete(self, folder):
        self._called()
        with self.changed:
            self.rows = {k: v for k, v in self.rows.items() if not k.startswith(folder)}

    def wait_at_barrier(self, name, timeout_in_ms):
        self._called()
        with self.changed:
            self.at_barrier.setdefault(name, 0)
            if self.at_barrier[name] < 0:
                raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out.")
            self.at_barrier[name] += 1
            self.changed.notify_all()
            met = self.changed.wait_for(
                lambda: not 0 <= self.at_barrier[name] < self.world, timeout_in_ms / 1000
            )
            if not met or self.at_barrier[name] < 0:
                self.at_barrier[name] = -1
                self.changed.notify_all()
                raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out.")


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def go(ranks, clock, seconds, but=()):
    """Let the ranks exchange once a second, all but those that are dead."""
    for _ in range(round(seconds)):
        clock.now += 1
        for rank in ranks:
            if rank.rank not in but:
                rank.exchange_entries()
