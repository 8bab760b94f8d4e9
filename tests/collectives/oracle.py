"""What each collective does to the shards of a group, in NumPy: arrays [n, *local shape]."""

import numpy as np


def psum(x):
    return np.broadcast_to(x.sum(0), x.shape)


def pmean(x):
    return np.broadcast_to(x.mean(0), x.shape)


def pmax(x):
    return np.broadcast_to(x.max(0), x.shape)


def pmin(x):
    return np.broadcast_to(x.min(0), x.shape)


def all_gather(x, dim=0):
    whole = np.concatenate(list(x), axis=dim)
    return np.broadcast_to(whole, (len(x), *whole.shape))


def reduce_scatter(x, dim=0, mean=False):
    total = x.mean(0) if mean else x.sum(0)
    return np.stack(np.split(total, len(x), axis=dim))


def all_to_all(x, split_dim, concat_dim):
    pieces = [np.split(shard, len(x), axis=split_dim) for shard in x]
    n = range(len(x))
    return np.stack([np.concatenate([pieces[j][i] for j in n], axis=concat_dim) for i in n])


def ppermute(x, perm):
    y = np.zeros_like(x)
    for source, destination in perm:
        y[destination] = x[source]
    return y


def shift(x, by=1, wrap=True):
    n = len(x)
    return ppermute(x, [(i, (i + by) % n) for i in range(n) if wrap or 0 <= i + by < n])


def broadcast(x, root=0):
    return np.broadcast_to(x[root], x.shape)


def vary(x):
    return x


def per_group(fn, x, sizes, axes):
    """Apply `fn` to every group along `axes` of shards [world, *local], row-major."""
    names = list(sizes)
    local = x.shape[1:]
    grid = x.reshape(*sizes.values(), *local)
    at = [names.index(a) for a in axes]
    rest = [i for i in range(len(names)) if i not in at]
    order = rest + at + list(range(len(names), grid.ndim))
    moved = grid.transpose(order)
    groups = int(np.prod([sizes[names[i]] for i in rest]))
    out = np.stack([fn(g) for g in moved.reshape(groups, -1, *local)])
    grid_out = out.reshape(*(sizes[names[i]] for i in rest + at), *out.shape[2:])
    back = np.argsort(rest + at).tolist() + list(range(len(names), grid_out.ndim))
    return grid_out.transpose(back).reshape(-1, *out.shape[2:])
