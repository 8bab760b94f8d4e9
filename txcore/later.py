"""Names of a package that are imported when they are first used. Ground floor."""

import importlib
import sys
from collections.abc import Callable, Mapping


def import_later(package: str, names: Mapping[str, str]) -> Callable[[str], object]:
    """Make the `__getattr__` of a package that imports some of its names on first use.

    Args:
      package: the package's `__name__`.
      names: for each name the module that it comes from, or that it is. No submodule of the
        package may have the name of something else: importing it would put it in its place.

    Returns:
      The function, to be called `__getattr__` in the package.

    Example:
      >>> find = import_later("txcore", {"testing": "txcore.testing"})
      >>> find("testing").__name__
      'txcore.testing'
    """

    def find(name: str) -> object:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(names[name])
        is_module = names[name].rpartition(".")[2] == name
        found: object = module if is_module else getattr(module, name)
        setattr(sys.modules[package], name, found)  # from now on it is found at once
        return found

    return find
