"""The ops and their gradients in float64 NumPy, written from the equations alone."""

import numpy as np


def padded(x, w, padding):
    if padding == "VALID":
        return x, (0, 0)
    before = [(size - 1) // 2 for size in w.shape[:2]]
    after = [size - 1 - b for size, b in zip(w.shape[:2], before, strict=True)]
    pads = [(0, 0), (before[0], after[0]), (before[1], after[1]), (0, 0)]
    return np.pad(x, pads), before


def windows(y):
    """Return (batch, height // 2, width // 2, 4, channels): a copy of each window, row by row."""
    batch, height, width, channels = y.shape
    y = y[:, : height // 2 * 2, : width // 2 * 2]
    y = y.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(batch, height // 2, width // 2, 4, channels)


def conv2d(x, w, b, g, activation=None, pool=None, padding="SAME"):
    """Return the output, and (dx, dw, db) for its cotangent g (a function of the output)."""
    x, w, b = (np.asarray(a, np.float64) for a in (x, w, b))
    xp, before = padded(x, w, padding)
    rows, columns = w.shape[:2]
    height, width = xp.shape[1] - rows + 1, xp.shape[2] - columns + 1
    y = np.zeros((x.shape[0], height, width, w.shape[3])) + b
    for i in range(rows):
        for j in range(columns):
            y += xp[:, i : i + height, j : j + width] @ w[i, j]
    z = np.maximum(y, 0) if activation == "relu" else y
    out = windows(z).max(3) if pool else z
    g = np.asarray(g(out), np.float64)

    dz = np.zeros_like(z)
    if pool:
        first = windows(y).argmax(3)  # of the equal ones the first, where ReLU passes any at all
        for n, r, c, k in np.ndindex(*g.shape):
            row, column = divmod(first[n, r, c, k], 2)
            dz[n, 2 * r + row, 2 * c + column, k] = g[n, r, c, k]
    else:
        dz = g
    dy = dz * (y > 0) if activation == "relu" else dz

    dw, dxp = np.zeros_like(w), np.zeros_like(xp)
    for i in range(rows):
        for j in range(columns):
            part = xp[:, i : i + height, j : j + width]
            dw[i, j] = np.einsum("nhwi,nhwo->io", part, dy)
            dxp[:, i : i + height, j : j + width] += dy @ w[i, j].T
    top, left = before
    dx = dxp[:, top : top + x.shape[1], left : left + x.shape[2]]
    return out, (dx, dw, dy.sum((0, 1, 2)))


def dense(x, w, b, g, activation=None):
    x, w, b = (np.asarray(a, np.float64) for a in (x, w, b))
    y = x @ w + b
    out = np.maximum(y, 0) if activation == "relu" else y
    dy = np.asarray(g(out), np.float64) * ((y > 0) if activation == "relu" else 1)
    rows = dy.reshape(-1, dy.shape[-1])
    return out, (dy @ w.T, x.reshape(-1, x.shape[-1]).T @ rows, rows.sum(0))


def cross_entropy(logits, g, labels):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    probability = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    one_hot = np.eye(logits.shape[-1])[np.asarray(labels)]
    out = np.log(np.exp(shifted).sum(-1)) - (shifted * one_hot).sum(-1)
    return out, ((probability - one_hot) * np.asarray(g(out), np.float64)[..., None],)


def sgd_momentum(p, g, v, learning_rate, momentum, nesterov=False, weight_decay=0.0):
    p, g, v = (np.asarray(a, np.float64) for a in (p, g, v))
    d = g + weight_decay * p
    v = momentum * v + d
    return p - learning_rate * (d + momentum * v if nesterov else v), v


def adamw(p, g, m, v, step, learning_rate, b1, b2, eps, weight_decay):
    p, g, m, v = (np.asarray(a, np.float64) for a in (p, g, m, v))
    m, v, t = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2, step + 1
    change = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps) + weight_decay * p
    return p - learning_rate * change, m, v


def smoothed_cross_entropy(logits, labels, g, label_smoothing=0.0):
    """Return the losses, and (dlogits,); a class that is ruled out has probability 0."""
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    classes = logits.shape[-1]
    wanted = np.eye(classes)[labels] * (1 - label_smoothing) + label_smoothing / classes
    # 0 * -inf counts as 0: what has no weight does not matter.
    out = -np.where(wanted > 0, wanted * np.where(wanted > 0, log_p, 0), 0).sum(-1)
    return out, ((np.exp(log_p) - wanted) * np.asarray(g(out), np.float64)[..., None],)


def linear_cross_entropy(x, w, b, labels, g, label_smoothing=0.0):
    """Return the losses, and (dx, dw, db)."""
    x, w, b = (np.asarray(a, np.float64) for a in (x, w, b))
    out, (dy,) = smoothed_cross_entropy(x @ w + b, labels, g, label_smoothing)
    rows = dy.reshape(-1, dy.shape[-1])
    return out, (dy @ w.T, x.reshape(-1, x.shape[-1]).T @ rows, rows.sum(0))
