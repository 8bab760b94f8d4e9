"""Importing txcore: no backend, none of the optional packages, and little over importing jax."""

import json
import os
import statistics
import subprocess
import sys

import pytest

OPTIONAL = ("optax", "orbax", "sklearn", "matplotlib", "tqdm", "pytest")
LIMIT = 1.2  # 1.16 on two cores with a load of 15, jax 0.12
ROUNDS = 5


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


def cost(cache):
    """Return the time of importing txcore, jax's included, in times of jax's alone."""
    # In one process, so that a slow moment of the machine is in both.
    done = run_python("-X", "importtime", "-c", "import jax, txcore", PYTHONPYCACHEPREFIX=cache)
    rows = [line.split("|") for line in done.stderr.splitlines() if line.count("|") == 2]
    cumulative = {name.strip(): total for _, total, name in rows}
    return 1 + int(cumulative["txcore"]) / int(cumulative["jax"])


def test_costs_little_over_jax(tmp_path):
    cost(str(tmp_path))
    medians = []
    for _ in range(3):
        medians.append(statistics.median(cost(str(tmp_path)) for _ in range(ROUNDS)))
        if medians[-1] <= LIMIT:
            return
    pytest.fail(f"import txcore takes {medians} times import jax; at most {LIMIT} is allowed")
