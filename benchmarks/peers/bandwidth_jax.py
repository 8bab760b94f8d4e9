"""A rank of jax that makes all-reduces as its stdin asks for them.

python bandwidth_jax.py HOST:PORT PROCESSES RANK DEVICES ANSWERS plain|txcore

"plain" is `jax.lax.psum` in a run that jax itself joins; "txcore" the mean by an algorithm of
`tx.DP(algorithm=)` in one that `tx.initialize` joins.
"""

import functools
import json
import os
import resource
import sys

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

import txcore as tx
from txcore.bench import OPERATIONS, Operation, Setup, check, mean_by, measure
from txcore.launch.gloo_threads import yield_to_compute


def join(address: str, processes: int, rank: int, devices: int, library: str) -> None:
    """Join the ranks."""
    if processes == 1:
        jax.config.update("jax_num_cpu_devices", devices)
    elif library == "txcore":
        tx.initialize(address, processes, rank)
    else:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, processes, rank)


def operation_of(form: str) -> Operation:
    """Return what a form runs."""
    if not form.startswith("psum"):
        return mean_by(form)
    summed = functools.partial(Operation, "lax.psum", "all-reduce", lambda x, a: jax.lax.psum(x, a))
    return summed(OPERATIONS["psum"].expect)


def main() -> None:
    """Serve calls; each form is compiled once for a size, and checked then."""
    address, processes, rank, devices = sys.argv[1], *map(int, sys.argv[2:5])
    answers = os.fdopen(int(sys.argv[5]), "w", encoding="utf-8")
    join(address, processes, rank, devices, sys.argv[6])
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    if sys.argv[6] == "txcore":
        yield_to_compute()  # as `Engine` does

    @functools.cache
    def compiled(form: str, size: int):
        setup = Setup(mesh, ("data",), warmup=2, in_place=form != "psum")
        program = measure.compile_operation(setup, operation_of(form), "float32", size // 4)
        given = setup, operation_of(form), "float32", size // 4, program
        wrong = measure.check_results(*given, check.draw_operand(0))
        assert not wrong, f"{form} of {size} bytes: {wrong} wrong elements"
        return program

    print(json.dumps({"jax": jax.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        form, size = asked["form"], asked["size"]
        setup = Setup(mesh, ("data",), 2, asked["calls"], in_place=form != "psum")
        program = compiled(form, size)
        began = _cpu()
        seconds = measure.time_calls(setup, operation_of(form), "float32", size // 4, program)
        spent = (_cpu() - began) * asked["calls"] / (asked["calls"] + 2)
        print(json.dumps({"seconds": seconds, "cpu_seconds": spent}), file=answers, flush=True)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
