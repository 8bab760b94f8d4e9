"""Names that are imported when first used: each is what its package says, whatever was imported."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import txcore as tx
from txcore import kernels, launch, train

PACKAGES = {"txcore": tx, "txcore.launch": launch, "txcore.train": train, "txcore.kernels": kernels}


def typed_imports(package):
    """Yield (name, module) of what a package imports for type checkers alone."""
    for node in ast.parse(Path(package.__file__).read_text()).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                yield from ((alias.name, line.module) for alias in line.names)


NAMES = [
    (package, name, module)
    for package, found in PACKAGES.items()
    for name, module in typed_imports(found)
]
MODULES = {"context", "pipeline", "tensor", "testing"}


@pytest.mark.parametrize("package, name, module", NAMES)
def test_a_name_is_what_the_type_checker_is_told(package, name, module):
    found = getattr(PACKAGES[package], name)
    if name in MODULES:
        assert inspect.ismodule(found)
        assert found.__name__ == f"{module}.{name}"
    else:
        assert callable(found)
        assert found is getattr(sys.modules[module], name)
    assert found is getattr(PACKAGES[package], name)


def test_all_public_names_are_shown():
    assert {name for package, name, _ in NAMES if package == "txcore"} <= set(dir(tx))


def test_a_name_is_found_first_in_a_new_process():
    lines = [f"import {package}" for package in PACKAGES]
    lines += [f"assert {package}.{name} is not None, {name!r}" for package, name, _ in NAMES]
    lines += ["assert callable(txcore.initialize) and callable(txcore.launch.cluster)"]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=120)


def test_another_name_is_refused():
    with pytest.raises(AttributeError, match="module 'txcore' has no attribute 'nothing'"):
        tx.nothing  # noqa: B018
