"""The pytest fixture `collectives_lock`, in projects of its own."""

import importlib.metadata
import json

import pytest

pytest_plugins = ["pytester"]

CONFTEST = """
import os
os.environ.setdefault("JAX_PLATFORMS", "cpu")
pytest_plugins = ["txcore.profiling.pytest_plugin"]
"""
PROGRAM = """
import jax, os, pytest
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

ROWS = int(os.environ.get("ROWS", "8"))

def program(body=lambda x: jax.lax.psum(x, "data"), wrap=True, mesh=None):
    mesh = mesh or Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((ROWS, 4), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    if not wrap:
        return body, x
    return jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P()), x
"""
TESTS = (
    PROGRAM
    + """
class TestStep:
    @pytest.mark.parametrize("size", [1, "a/b"])
    def test_total(self, collectives_lock, size):
        report = collectives_lock(*program())
        assert len(report.collectives) == 1

def test_two(collectives_lock):
    collectives_lock(*program())
    collectives_lock(*program(lambda x: jax.lax.pmax(x, "data")), name="largest", exact=True)

def test_targets(collectives_lock):
    def build(mesh):
        fn, x = program(mesh=mesh)
        return fn, (x,)

    for size in (2, 4):
        collectives_lock(build, target=f"cpu:{size}", mesh={"data": size})
"""
)
FILES = [
    "test_step.TestStep.test_total[1].lock.json",
    "test_step.TestStep.test_total[a_b].196e15bd.lock.json",
    "test_step.test_targets.lock.json",
    "test_step.test_two.largest.lock.json",
    "test_step.test_two.lock.json",
]


@pytest.fixture
def project(pytester):
    """A project whose tests lock programs; it returns what a run of its tests printed."""
    pytester.makeconftest(CONFTEST)

    def run(tests=TESTS, *options):
        pytester.makepyfile(test_step=tests)
        return pytester.runpytest_inprocess("-p", "no:cacheprovider", *options)

    return run


def locks(pytester):
    return {p.name: p.read_text() for p in (pytester.path / "__collectives__").glob("*")}


def test_nothing_is_locked_unasked(project, pytester):
    result = project()
    result.assert_outcomes(failed=4)
    result.stdout.fnmatch_lines(
        ["*cannot read *test_two.lock.json: No such file or directory; pytest --update-c*"]
    )
    assert not (pytester.path / "__collectives__").exists()


def test_updating_checking_and_growing(project, pytester, monkeypatch):
    result = project(TESTS, "--update-collectives")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(
        ["*= collectives =*", "*::test_two", "+ test_step.py  all-reduce  data  float32  64 B*",
         "*test_two.lock.json: 1 entry locked for cpu:2 data=2"]
    )  # fmt: skip
    written = locks(pytester)
    assert sorted(written) == sorted(FILES)
    assert [*json.loads(written[FILES[0]])["targets"]] == ["cpu:2 data=2"]
    assert [*json.loads(written[FILES[2]])["targets"]] == ["cpu:2 data=2", "cpu:4 data=4"]

    result = project()
    result.assert_outcomes(passed=4)
    result.stdout.no_fnmatch_line("*= collectives =*")

    monkeypatch.setenv("ROWS", "16")
    result = project()
    result.assert_outcomes(failed=4)
    result.stdout.fnmatch_lines(["~ test_step.py  all-reduce  data  float32  64 B -> 128 B  x1*"])

    monkeypatch.setenv("ROWS", "4")  # less passes, but for the one that is exact
    result = project()
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["lock: nothing grew; 1 smaller or gone: update*"])
    assert locks(pytester) == written


BAD = {
    "a proof that failed": (
        "collectives_lock(*program(lambda x: x.sum(0), wrap=False))",
        "failed: 1 of 1 collective unexplained*",
    ),
    "a report and more": (
        "from txcore.profiling import audit\n"
        "    collectives_lock(audit(*program()), 3, target='cpu:2')",
        "*TypeError: collectives_lock needs a report alone or a function with its arguments, but "
        "got a report and 3, target: leave them out",
    ),
    "one file twice": (
        "collectives_lock(*program())\n    collectives_lock(*program())",
        "*Failed: collectives_lock holds two programs of this test to one lock: give name=*",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_uses_fail(name, project, pytester):
    code, message = BAD[name]
    test = f"{PROGRAM}\ndef test_it(collectives_lock):\n    {code}\n"
    result = project(test, "--update-collectives")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"*{message}"])


def test_a_damaged_lock_fails_and_is_not_overwritten(project, pytester):
    project(TESTS, "--update-collectives")
    path = pytester.path / "__collectives__" / FILES[-1]
    path.write_text("{")
    for options in ([], ["--update-collectives"]):
        result = project(TESTS, *options, "-k", "test_two")
        result.assert_outcomes(failed=1, deselected=3)
        result.stdout.fnmatch_lines(
            [f"*{FILES[-1]} needs JSON, got other text (*: restore it, or delete and*"]
        )
    assert path.read_text() == "{"


def test_in_a_process_of_its_own_and_not_in_other_projects(pytester):
    """It needs nothing but the line in conftest.py; without it pytest must not import jax."""
    test = """
        import sys
        def test_it(request):
            on = request.config.pluginmanager.has_plugin("txcore.profiling.pytest_plugin")
            assert on == ("jax" in sys.modules) == (request.path.parent.name == "with_plugin")
    """
    for name in ("with_plugin", "without"):
        pytester.mkdir(name)
        (pytester.path / name / "test_it.py").write_text("\n".join(
            line[8:] for line in test.splitlines()))  # fmt: skip
    (pytester.path / "with_plugin" / "conftest.py").write_text(CONFTEST)
    for name in ("with_plugin", "without"):
        result = pytester.runpytest_subprocess("-W", "error", "--rootdir", name, name)
        result.assert_outcomes(passed=1)
    points = importlib.metadata.distribution("txcore").entry_points
    assert [point.group for point in points if point.group == "pytest11"] == []
