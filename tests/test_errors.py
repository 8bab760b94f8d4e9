"""Every exception class of the packages has one base, and stays one of Python's."""

import ast
import importlib
import pathlib
import pkgutil
import re

import jax
import pytest

import txcore as tx
from txcore.profiling import AutoShardingError, audit, lock

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Every one of them, with the class of Python's by which others catch it.
CLASSES = {
    "TxcoreError": Exception,
    "AttestationError": RuntimeError,
    "AutoShardingError": AssertionError,
    "BadInput": Exception,
    "BadUsage": Exception,
    "CheckpointError": RuntimeError,
    "HloError": ValueError,
    "JsonError": ValueError,
    "LockError": ValueError,
    "MismatchError": RuntimeError,
    "NotTogether": RuntimeError,
    "RefusedError": ValueError,
    "TraceError": ValueError,
    "TuningError": ValueError,
    "_Refused": RuntimeError,
    "_TimeIsUpError": Exception,
    "_Unusable": RuntimeError,
}


def exceptions_of(package):
    """Import all of a package; return its exception classes by name."""
    found = {}
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        needs_triton = module.name.rpartition(".")[2].startswith("triton_")
        if not module.name.endswith("__main__") and not needs_triton:
            for name, value in vars(importlib.import_module(module.name)).items():
                is_error = isinstance(value, type) and issubclass(value, BaseException)
                if is_error and value.__module__.startswith("txcore"):
                    found[name] = value
    return found


def test_every_exception_class_has_the_base():
    found = exceptions_of(tx)
    assert found.keys() == CLASSES.keys()
    for name, usual in CLASSES.items():
        assert issubclass(found[name], tx.TxcoreError), name
        assert issubclass(found[name], usual), name


def test_none_is_hidden_in_a_function():
    """What importing does not show: classes in functions, by their bases' names in the source."""
    named = set()
    for folder in ("txcore", "kernels", "profiling"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    bases = [ast.unparse(base) for base in node.bases]
                    if any(
                        re.search(r"(Error|Exception|BadInput|NotTogether)$", base)
                        for base in bases
                    ):
                        named.add(node.name)
    assert named == CLASSES.keys()


def test_the_ground_floor_imports_nothing():
    tree = ast.parse((ROOT / "txcore" / "errors.py").read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_they_are_caught_by_the_base(tmp_path):
    with pytest.raises(tx.TxcoreError, match=r"cannot read .*none\.json"):
        lock.check(tmp_path / "none.json", audit(jax.numpy.sin, 1.0))
    with pytest.raises(tx.TxcoreError) as caught:
        raise AutoShardingError(audit(jax.numpy.sin, 1.0))
    assert isinstance(caught.value, AssertionError)
