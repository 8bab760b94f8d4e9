"""Run programs whose Mosaic GPU kernels talk by multimem, on NumPy: JAX's simulator knows none.

All devices take each step of the program together. In a kernel they run one after the other, which
is right for kernels that only wait at their end: what they wait for is counted, and no race can be
found.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

H100 = "NVIDIA H100 80GB HBM3"


def gpu_mesh(kind=H100, **axes):
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    kinds = (AxisType.Auto,) * len(axes)
    return AbstractMesh(tuple(axes.values()), tuple(axes), kinds, abstract_device=device)


def trace(function, *rows, kind=H100, check_vma=True, **axes):
    """Return the jaxpr of a function of each device's row."""
    given = [jax.ShapeDtypeStruct((len(r) * r.shape[1], *r.shape[2:]), r.dtype) for r in rows]
    with jax.sharding.use_abstract_mesh(gpu_mesh(kind, **axes)):
        names = P(tuple(axes))
        mapped = jax.shard_map(function, in_specs=names, out_specs=names, check_vma=check_vma)
        return jax.make_jaxpr(mapped)(*given)


def run_by_switch(function, *rows):
    """Run a function of each GPU's row; return the results of each GPU, and the waits' counts."""
    jaxpr = trace(function, *rows, data=len(rows[0]), check_vma=False)
    (mapped,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "shard_map"]
    node = Node(len(rows[0]))
    body = getattr(mapped.params["jaxpr"], "jaxpr", mapped.params["jaxpr"])
    arguments = [[jnp.asarray(row[d]) for row in rows] for d in range(node.devices)]
    return [outs[0] for outs in node.run_program(body, (), arguments)], node.waits


class Node:
    """GPUs of one node, each with its own values; a reference is an array of each."""

    def __init__(self, devices):
        self.devices = devices
        self.waits = []  # (what was waited for, the signals that came) of each block

    def run_program(self, jaxpr, constants, arguments):
        scopes = [
            dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *given], strict=True))
            for given in arguments
        ]
        for eqn in jaxpr.eqns:
            given = [[read(v, scope) for v in eqn.invars] for scope in scopes]
            for scope, outs in zip(scopes, self.run_step(eqn, given), strict=True):
                scope.update(zip(eqn.outvars, outs, strict=True))
        return [[read(v, scope) for v in jaxpr.outvars] for scope in scopes]

    def run_step(self, eqn, given):
        name, params = eqn.primitive.name, eqn.params
        if name == "mpmd_map":
            return self.run_kernel(eqn, given)
        if name == "axis_index":
            return [[jnp.int32(d)] for d in range(self.devices)]
        if name == "claim":
            return [values[:1] for values in given]
        inner = next((params[k] for k in ("jaxpr", "call_jaxpr", "call") if k in params), None)
        if inner is not None:
            return self.run_program(inner.jaxpr, inner.consts, given)
        return [listed(eqn.primitive.bind(*values, **params)) for values in given]

    def run_kernel(self, eqn, given):
        (mesh,), (body,) = eqn.params["meshes"], eqn.params["jaxprs"]
        refs = [[np.array(x) for x in values] for values in given]
        results = [
            [np.full(v.aval.shape, 77, v.aval.dtype) for v in eqn.outvars]
            for _ in range(self.devices)
        ]
        everywhere = list(zip(*(a + b for a, b in zip(refs, results, strict=True)), strict=True))
        for place in itertools.product(*map(range, mesh.shape.values())):
            signals = [0] * self.devices
            for device in range(self.devices):
                places = {**dict(zip(mesh.shape, place, strict=True)), "data": device}
                run = Run(self, device, places, signals)
                run.evaluate(getattr(body, "jaxpr", body), everywhere)
            self.waits += [(wanted, signals[device]) for device, wanted in run.waited]
        return [[jnp.asarray(x) for x in values] for values in results]


class Run:
    """A block of a kernel on one device."""

    def __init__(self, node, device, places, signals):
        self.node, self.device, self.places, self.signals = node, device, places, signals
        self.waited = []

    def evaluate(self, jaxpr, arguments, constants=()):
        scope = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))
        for eqn in jaxpr.eqns:
            outs = self.step(eqn, [read(v, scope) for v in eqn.invars])
            scope.update(zip(eqn.outvars, outs, strict=True))
        return [read(v, scope) for v in jaxpr.outvars]

    def step(self, eqn, given):
        name, params = eqn.primitive.name, eqn.params
        match name:
            case "axis_index":
                return [jnp.int32(self.places[params["axis_name"]])]
            case "run_scoped":
                inner = params["jaxpr"]
                scratch = [None] * (len(inner.invars))
                return self.evaluate(inner, scratch, given)
            case "while":
                return self.loop(params, given)
            case "cond":
                branch = params["branches"][int(given[0])]
                return self.evaluate(branch.jaxpr, given[1:], branch.consts)
            case "get":
                return [jnp.asarray(view(given, params["tree"])[self.device])]
            case "swap":
                target = view([given[0], *given[2:]], params["tree"])[self.device]
                old = target.copy()
                target[...] = np.asarray(given[1])
                return [jnp.asarray(old)]
            case "multimem_load_reduce":
                parts = view(given, params["tree"])
                wide = np.int64 if parts[0].dtype.kind == "i" else np.float32
                return [jnp.asarray(sum(p.astype(wide) for p in parts).astype(parts[0].dtype))]
            case "multimem_store":
                for part in view(given[1:], params["transforms_tree"]):
                    part[...] = np.asarray(given[0])
                return []
            case "layout_cast":
                return given
            case "semaphore_signal_multicast":
                for device in range(self.node.devices):
                    self.signals[device] += int(given[-1])
                return []
            case "semaphore_wait":
                self.waited.append((self.device, int(given[1])))
                return []
        if "jaxpr" in params:
            return self.evaluate(params["jaxpr"].jaxpr, given, params["jaxpr"].consts)
        return listed(eqn.primitive.bind(*given, **params))

    def loop(self, params, given):
        first, second = params["cond_nconsts"], params["body_nconsts"]
        of_cond, of_body = given[:first], given[first : first + second]
        carry, cond, body = given[first + second :], params["cond_jaxpr"], params["body_jaxpr"]
        while self.evaluate(cond.jaxpr, [*of_cond, *carry], cond.consts)[0]:
            carry = self.evaluate(body.jaxpr, [*of_body, *carry], body.consts)
        return carry


def read(var, scope):
    return var.val if hasattr(var, "val") else scope[var]


def listed(results):
    return list(results) if isinstance(results, list | tuple) else [results]


def view(given, tree):
    """Return the part of a reference that its transforms leave, on each device."""
    arrays, leaves = given[0], given[1:]
    parts = list(arrays)
    for transform in jax.tree.unflatten(tree, leaves):
        if hasattr(transform, "indices"):
            place = tuple(as_slice(index) for index in transform.indices)
            parts = [part[place] for part in parts]
        else:
            parts = [part.reshape(transform.shape) for part in parts]
    return parts


def as_slice(index):
    if hasattr(index, "size") and hasattr(index, "start"):
        return slice(int(index.start), int(index.start) + int(index.size))
    return int(index)
