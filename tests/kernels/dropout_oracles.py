"""Dropout's masks in NumPy, from the paper's definition of Threefry alone."""

import numpy as np

ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
KEEP_STEPS = 2**32


def threefry(key, counter):
    """Return both words of the block, round by round as in the paper's section 3 and figure 1."""
    with np.errstate(over="ignore"):
        k = [np.asarray(word, np.uint32) for word in key]
        k.append(np.uint32(0x1BD11BDA) ^ k[0] ^ k[1])
        x = [np.asarray(word, np.uint32) for word in counter]
        for turn in range(20):
            if turn % 4 == 0:
                x = inject(x, k, turn // 4)
            r = np.uint32(ROTATIONS[turn % 8])
            x[0] = x[0] + x[1]
            x[1] = ((x[1] << r) | (x[1] >> (np.uint32(32) - r))) ^ x[0]
        return inject(x, k, 5)


def inject(x, k, s):
    return [x[0] + k[s % 3], x[1] + k[(s + 1) % 3] + np.uint32(s)]


def keep(words, count, rate, offset=0):
    """Return (..., count): whether each counter of each key, words (..., 2), is kept."""
    words = np.asarray(words)
    counters = (np.arange(count, dtype=np.uint64) + offset).astype(np.uint32)
    key = words[..., 0:1], words[..., 1:2]
    first, second = threefry(key, (np.zeros_like(counters), counters))
    return (first ^ second) >= round(rate * KEEP_STEPS)


def dropout(x, words, rate, g, offset=0):
    x = np.asarray(x, np.float64)
    rows = words.shape[:-1]
    mask = keep(words, int(np.prod(x.shape[len(rows) :])), rate, offset).reshape(x.shape)
    share = 1 - round(rate * KEEP_STEPS) / KEEP_STEPS
    return np.where(mask, x / share, 0), np.where(mask, np.asarray(g, np.float64) / share, 0)


def activated(y, activation):
    """Return an activation and its derivative."""
    logistic = 1 / (1 + np.exp(-y))
    c = np.sqrt(2 / np.pi)
    t = np.tanh(c * (y + 0.044715 * y**3))
    slope = 0.5 * (1 + t) + 0.5 * y * (1 - t**2) * c * (1 + 3 * 0.044715 * y**2)
    return {
        None: lambda: (y, np.ones_like(y)),
        "relu": lambda: (np.maximum(y, 0), (y > 0).astype(float)),
        "gelu": lambda: (0.5 * y * (1 + t), slope),
        "tanh": lambda: (np.tanh(y), 1 - np.tanh(y) ** 2),
        "silu": lambda: (y * logistic, logistic * (1 + y * (1 - logistic))),
    }[activation]()


def dense(x, w, b, g, activation=None, rate=0.0, words=None):
    """Return the output and (dx, dw, db) for its cotangent g."""
    x, w, b, g = (np.asarray(a, np.float64) for a in (x, w, b, g))
    out, slope = activated(x @ w + b, activation)
    if rate:
        out, _ = dropout(out, words, rate, g)
        _, g = dropout(out, words, rate, g)
    dy = g * slope
    rows = dy.reshape(-1, dy.shape[-1])
    return out, (dy @ w.T, x.reshape(-1, x.shape[-1]).T @ rows, rows.sum(0))
