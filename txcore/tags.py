"""Tags: names in a program's scopes that identify its compiled collectives."""

import contextlib
import re
from typing import Any

import jax

# The frontend attribute that held the tags in earlier versions: old dumps have it.
TAG_KEY = "txcore"
_TAG = re.compile(r"txcore\[([A-Za-z0-9_./-]+)\]")


def tag_scope(tag: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which operations carry `tag` in their path of scopes, HLO's op_name.

    It is no frontend attribute: XLA for TPU combines only collectives whose attributes are equal.
    """
    return jax.named_scope(f"txcore[{tag}]")


def tags_in(path: str) -> tuple[str, ...]:
    """Return txcore's tags in a path of scopes, each once; several where ops were merged."""
    return tuple(dict.fromkeys(_TAG.findall(path)))


def tag_in(path: str) -> str | None:
    """Return the innermost of txcore's tags in a traced equation's path, or None."""
    tags = tags_in(path)
    return tags[-1] if tags else None
