"""Names of a package that are imported when they are first used. Ground floor."""

import importlib
import sys
from collections.abc import Callable, Mapping


def import_later(
    package: str, names: Mapping[str, str], modules: Mapping[str, str] | None = None
) -> Callable[[str], object]:
    """Make the `__getattr__` of a package that imports some of its names on first use.

    Args:
      package: the package's `__name__`.
      names: for each name the module that it comes from. No submodule of the package may have such
        a name: importing the submodule would put it in the place of what the name stands for.
      modules: for each name the module that it stands for.

    Returns:
      The function, to be called `__getattr__` in the package.

    Example:
      >>> find = import_later("txcore", {"VERSION": "txcore.version"}, {"mesh": "txcore.mesh"})
      >>> find("VERSION") == tx.__version__, find("mesh").__name__
      (True, 'txcore.mesh')
    """

    def find(name: str) -> object:
        found: object
        if name in names:
            found = getattr(importlib.import_module(names[name]), name)
        elif modules is not None and name in modules:
            found = importlib.import_module(modules[name])
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, found)  # from now on it is found at once
        return found

    return find
