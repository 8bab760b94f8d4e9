"""What a program was when it was locked, beyond what it sends: its compiler, options and module.

The optimized module is compared without what may change although the program is the same: names
and lines of the source, the names of its instructions, and what a compiler measures or counts on
the machine (`backend_config`). So constants that its text leaves out (`{...}`) are not compared.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from txcore import _compat
from txcore.profiling.program import Program

_TABLES = re.compile(r"^(?:FileNames|FunctionNames|FileLocations|StackFrames)\n(?:.+\n)*", re.M)
_HEADER = re.compile(r"^HloModule .*$", re.M)
_LAYOUT = re.compile(r"entry_computation_layout=\{(.*?)\}(?:, \w+=|$)")
# Attributes with braces in them, which may be nested twice, and with texts.
_INSIDE = r'\{(?:[^{}"]|"(?:[^"\\]|\\.)*"|\{(?:[^{}"]|"(?:[^"\\]|\\.)*"|\{[^{}]*\})*\})*\}'
_DROPPED = re.compile(rf", (?:metadata|frontend_attributes)={_INSIDE}")
_CONFIG = re.compile(rf", backend_config=(?:{_INSIDE}|\"(?:[^\"\\]|\\.)*\")")
# A kernel's own code is in its configuration; a library's is what it measured to be fast.
_LIBRARIES = ('custom_call_target="__cu', 'custom_call_target="__onednn')
_SIGNATURE = re.compile(r"^((?:ENTRY )?%[\w.\-]+) \(.*\{$", re.M)
_STACK = re.compile(r", (?:stack_frame_id=\d+|source_file=\"[^\"]*\"|source_line=\d+)")
_COMMENT = re.compile(r"/\*.*?\*/")
_NAME = re.compile(r"%[\w.\-]+")
_OPCODE = re.compile(r"= (?:\([^=]*?\)|\S+) ([a-z][\w\-]*)\(")
_MOST_NAMED = 8
_DUMPS = ("xla_dump_",)
_MACHINE = ("--xla_dump_", "--xla_force_host_platform_device_count")


@dataclass(frozen=True)
class Proof:
    """The program that was proved, as far as it can be told from another.

    Attributes:
      name: "jit(step)".
      versions: of jax and jaxlib.
      options: XLA's compiler options, as text.
      flags: XLA_FLAGS and LIBTPU_INIT_ARGS, sorted, without what dumps or counts devices.
      arguments: a digest of the arguments' and results' dtypes, dims and layouts.
      opcodes: how many instructions of each kind the module has, to tell what differs.
      module: a digest of the optimized module.
    """

    name: str
    versions: Mapping[str, str]
    options: Mapping[str, str]
    flags: tuple[str, ...]
    arguments: str
    opcodes: Mapping[str, int] = field(default_factory=dict)
    module: str = ""

    @property
    def line(self) -> str:
        """The proof in a word: the beginning of the module's digest."""
        return f"sha256:{self.module[:16]}"


def proof_of(program: Program) -> Proof:
    """Return what a program is, for its lock file."""
    lowered = getattr(program.lowered, "_lowering", None)
    options = _compat.lowered_options(lowered, program.options)
    return make_proof(_compat.lowered_name(lowered), program.compiled.as_text() or "", options)


def make_proof(name: str, text: str, options: Mapping[str, Any]) -> Proof:
    """Return what a program is.

    Args:
      name: "jit(step)".
      text: its optimized module.
      options: the compiler options that it was compiled with.

    Example:
      >>> text = jax.jit(jnp.sin).lower(jnp.ones(3)).compile().as_text()
      >>> again = make_proof("jit(sin)", text.replace("sin", "sine_of"), {})
      >>> again == make_proof("jit(sin)", text, {})
      False
    """
    plain = _plain(text)
    header = _HEADER.search(text)
    layout = _LAYOUT.search(header[0]) if header else None
    return Proof(
        name,
        _versions(),
        {k: str(v) for k, v in sorted(options.items()) if not k.startswith(_DUMPS)},
        tuple(_flags()),
        _digest(layout[1] if layout else ""),
        dict(sorted(Counter(_OPCODE.findall(plain)).items())),
        _digest(plain),
    )


def list_differences(locked: Proof, now: Proof) -> list[str]:
    """List in words what differs between two proofs, but for their collectives."""
    lines = _of_tables(locked.versions, now.versions, "")
    lines += _of_tables(locked.options, now.options, "compiler option ")
    for flag in sorted({*locked.flags} ^ {*now.flags}):
        lines.append(f"{flag} is {'not ' if flag in locked.flags else ''}set")
    if lines:  # of which all the rest may follow
        return lines
    if locked.arguments != now.arguments:
        lines.append("its arguments or results have other dtypes, dims or layouts")
    if locked.module != now.module:
        lines.append(_describe_opcodes(locked.opcodes, now.opcodes))
    return lines


def _describe_opcodes(locked: Mapping[str, int], now: Mapping[str, int]) -> str:
    counts = [(op, locked.get(op, 0), now.get(op, 0)) for op in sorted({*locked, *now})]
    changed = [f"{op} {before} -> {after}" for op, before, after in counts if before != after]
    if not changed:
        return "its optimized module computes something else with as many instructions of each kind"
    more = f" and {len(changed) - _MOST_NAMED} kinds more" if len(changed) > _MOST_NAMED else ""
    return f"its optimized module has other instructions: {', '.join(changed[:_MOST_NAMED])}{more}"


def _of_tables(locked: Mapping[str, str], now: Mapping[str, str], what: str) -> list[str]:
    return [
        f"{what}{name}: {now.get(name, 'none')}, locked with {locked.get(name, 'none')}"
        for name in sorted({*locked, *now})
        if locked.get(name) != now.get(name)
    ]


def _plain(text: str) -> str:
    """Return a module without what may change; names are numbered in their order."""
    text = _HEADER.sub("HloModule", _TABLES.sub("", text))
    text = _STACK.sub("", _DROPPED.sub("", _COMMENT.sub("", text)))
    text = "\n".join(map(_without_measured, _SIGNATURE.sub(r"\1 {", text).splitlines()))
    numbers: dict[str, str] = {}

    def number(found: "re.Match[str]") -> str:
        return numbers.setdefault(found[0], f"%{len(numbers)}")

    return _NAME.sub(number, text)


def _without_measured(line: str) -> str:
    if " custom-call(" in line and not any(name in line for name in _LIBRARIES):
        return line
    return _CONFIG.sub("", line)


def _versions() -> dict[str, str]:
    import jaxlib

    return {"jax": jax.__version__, "jaxlib": jaxlib.__version__}


def _flags() -> list[str]:
    words = " ".join(os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")).split()
    return sorted({word for word in words if not word.startswith(_MACHINE)})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
