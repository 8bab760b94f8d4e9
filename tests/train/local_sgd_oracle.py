"""Local SGD, delayed gradients and Adasum in float64 NumPy, for the model of toys.py."""

import numpy as np


def gradient(params, batch):
    """The gradient of the mean over the real examples of a batch, and that mean."""
    keep = batch["mask"] != 0
    x, y = np.float64(batch["x"][keep]), np.float64(batch["y"][keep])
    hidden = np.tanh(x @ params["w1"])
    error = (hidden @ params["w2"])[:, 0] - y
    d_out = 2 * error[:, None] / len(x)
    d_hidden = d_out @ params["w2"].T * (1 - hidden**2)
    return {"w1": x.T @ d_hidden, "w2": hidden.T @ d_out}, float(np.mean(error**2))


def share(batch, i, n):
    return {name: np.split(x, n)[i] for name, x in batch.items()}


def widen(params):
    return {name: np.float64(x) for name, x in params.items()}


class Local:
    """N devices with momentum, averaged every H steps, with an outer Nesterov momentum or not."""

    def __init__(self, params, n, every, *, rate=0.1, momentum=0.0, outer=None, clip=None):
        self.stored, self.n, self.every = widen(params), n, every
        self.rate, self.momentum, self.outer, self.clip = rate, momentum, outer, clip
        self.own = [widen(params) for _ in range(n)]
        zeros = {name: np.zeros_like(x) for name, x in self.stored.items()}
        self.velocity = [dict(zeros) for _ in range(n)]
        self.outer_velocity, self.steps = dict(zeros), 0

    def step(self, batch):
        """Make a step; return the mean loss over all examples."""
        total = 0.0
        for i in range(self.n):
            own = share(batch, i, self.n)
            grads, loss = gradient(self.own[i], own)
            total += loss * np.count_nonzero(own["mask"])
            scale = 1.0
            if self.clip is not None:
                norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
                scale = min(1.0, self.clip / norm)
            for name, grad in grads.items():
                velocity = self.momentum * self.velocity[i][name] + scale * grad
                self.velocity[i][name] = velocity
                self.own[i][name] = self.own[i][name] - self.rate * velocity
        self.steps += 1
        if self.steps % self.every == 0:
            self.average()
        return total / np.count_nonzero(batch["mask"])

    def average(self):
        for name, old in self.stored.items():
            mean = np.mean([own[name] for own in self.own], axis=0)
            if self.outer is not None:
                rate, momentum = self.outer
                grad = old - mean
                velocity = momentum * self.outer_velocity[name] + grad
                self.outer_velocity[name] = velocity
                mean = old - rate * (grad + momentum * velocity)
            self.stored[name] = mean
            for own in self.own:
                own[name] = mean


def adasum(vectors):
    """The pairwise rule over neighbours, then over pairs of them (Maleki et al., equation 7)."""
    vectors = [np.float64(v) for v in vectors]
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [_join(a, b) for a, b in pairs]
    return vectors[0]


def _join(a, b):
    ab, aa, bb = np.sum(a * b), np.sum(a * a), np.sum(b * b)
    of_a = 1 - (ab / (2 * aa) if aa else 0)
    of_b = 1 - (ab / (2 * bb) if bb else 0)
    return of_a * a + of_b * b
