"""Importing txcore: no backend, none of the optional packages, and little over importing jax."""

import json
import os
import statistics
import subprocess
import sys

OPTIONAL = ("optax", "orbax", "sklearn", "matplotlib", "tqdm", "pytest")
LIMIT = 1.25  # 1.16 on two busy cores, jax 0.12


def run_python(*args, **environment):
    """Run Python outside the repository; fail with what it wrote to stderr."""
    # Without cached bytecode compiling would be measured.
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-P", *args],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=os.sep,
        env=kept | environment,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_no_backend_and_no_optional_package():
    code = (
        "import json, sys, txcore; from txcore import _compat; "
        "print(json.dumps([_compat.backend_started(), sorted(sys.modules)]))"
    )
    started, modules = json.loads(run_python("-c", code).stdout)
    assert started is False
    assert "txcore.train.engine" in modules
    assert {name.partition(".")[0] for name in modules} & set(OPTIONAL) == set()


COST = """
import time
a = time.process_time()
import jax
b = time.process_time()
import txcore
print((time.process_time() - a) / (b - a))
"""


def cost(cache):
    """Return the CPU time of importing txcore, jax's included, in times of jax's alone.

    Both are measured in one process, and its CPU time leaves out that a busy machine lets it wait.
    """
    return float(run_python("-c", COST, PYTHONPYCACHEPREFIX=cache).stdout)


def test_costs_little_over_jax(tmp_path):
    cost(str(tmp_path))  # compiles the modules
    costs = [cost(str(tmp_path)) for _ in range(3)]
    assert statistics.median(costs) <= LIMIT, f"{costs} times import jax; at most {LIMIT}"
