"""What a program is compiled with, beside its source: what is proved is what runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from txcore import _compat

# jax's settings, by what they are called here; without an answer jax's default holds.
_SETTINGS = {
    "optimization level": ("jax_optimization_level", "UNKNOWN"),
    "matmul precision": ("jax_default_matmul_precision", None),
    "PRNG": ("jax_default_prng_impl", "threefry2x32"),
    "64 bits": ("jax_enable_x64", False),
}


@dataclass(frozen=True)
class CompiledWith:
    """Hold the XLA options and jax settings that a program was traced and compiled with.

    Attributes:
      xla_options: sorted by name.
      settings: jax's settings that change numbers or speed, by name; "default" where nobody set it.

    Example:
      >>> import jax
      >>> with jax.default_matmul_precision("highest"):
      ...     print(read_compiled_with({"xla_embed_ir_in_executable": True}))
      XLA's xla_embed_ir_in_executable='True', matmul precision highest
    """

    xla_options: tuple[tuple[str, str], ...] = ()
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def changed(self) -> dict[str, str]:
        """Return all that differs from jax's defaults, by name."""
        differing = {name: text for name, text in self.settings if text != "default"}
        return {**dict(self.xla_options), **differing}

    def __str__(self) -> str:
        parts = [f"XLA's {name}={text!r}" for name, text in self.xla_options]
        parts += [f"{name} {text}" for name, text in self.settings if text != "default"]
        return ", ".join(parts) or "jax's defaults"


def read_compiled_with(options: Mapping[str, Any]) -> CompiledWith:
    """Return what a program is compiled with now, in this thread.

    Args:
      options: XLA's options.
    """
    read = {name: _read_setting(*setting) for name, setting in _SETTINGS.items()}
    own = tuple(sorted((name, str(value)) for name, value in options.items()))
    return CompiledWith(own, tuple(read.items()))


def _read_setting(name: str, default: Any) -> str:
    try:
        value = _compat.setting(name)
    except AttributeError:  # not in this jax
        return "default"
    return "default" if value == default else str(value)
