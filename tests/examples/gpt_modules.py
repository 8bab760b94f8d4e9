"""The modules of examples/gpt_small, whose names are also those of examples/mnist."""

import importlib
import pathlib
import sys
from types import SimpleNamespace

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "examples" / "gpt_small"
NAMES = ("model", "data", "sample", "communication", "cli", "train")


def _load():
    hidden = {n: m for n, m in sys.modules.items() if n.split(".")[0] in NAMES}
    for name in hidden:
        del sys.modules[name]
    sys.path.insert(0, str(FOLDER))
    try:
        return SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


gpt = _load()
