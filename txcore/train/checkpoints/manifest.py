"""The manifest of a checkpoint: a file beside orbax's that describes and verifies them."""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from txcore import bounded_json
from txcore.errors import TxcoreError
from txcore.outside import brief, open_regular, printable, read_regular

NAME = "txcore.json"
PREFIX = "step_"  # of a checkpoint's folder, before its steps
FORMAT = "txcore-checkpoint"
VERSION = 1
MOST_BYTES = 1 << 26  # of the manifest, when it is written and when it is read
# The files that orbax itself writes after the manifest is made.
_LATE = ("_CHECKPOINT_METADATA", "commit_success.txt")
_CHUNK = 1 << 20
_COUNT = range(10**18)
_KIND = re.compile(
    r"([\w<>.:-]{1,64})\[(?:\d{1,18}(?:, \d{1,18}){0,63})?\](?: \d{1,18})?", re.ASCII
)
_SCHEMA = {
    "position": {
        **dict.fromkeys(("steps", "epoch", "batch", "rows", "examples"), _COUNT),
        "seconds": float,
    },
    "leaves": [(str, str)],
    "precision": str,
    "files": {str: (_COUNT, str)},
    "versions": {str: str},
    "metric?": frozenset({None, (str, frozenset({"max", "min"}), float)}),
}


class CheckpointError(TxcoreError, RuntimeError):
    """A checkpoint cannot be made or used; the text says which, why, and what to do.

    Attributes:
      every_rank: whether every process raises it alike, so that they may go on together.
    """

    def __init__(self, text: str, *, every_rank: bool = False) -> None:
        super().__init__(text)
        self.every_rank = every_rank


@dataclass(frozen=True)
class Position:
    """Hold how far `fit` has come; with the state and the data it determines the rest of the run.

    Attributes:
      steps: batches done, including those whose update was skipped.
      epoch: the pass over the data, from 0.
      batch: batches of that pass done.
      rows: of the global batches of that pass, including padding.
      examples: so far, without padding.
      seconds: of training so far, without compilation, evaluation and saving.
    """

    steps: int = 0
    epoch: int = 0
    batch: int = 0
    rows: int = 0
    examples: int = 0
    seconds: float = 0.0


class Leaf(NamedTuple):
    """Name one array of a state: "stored_params['w']", "float32[3,4]"."""

    path: str
    kind: str


class Metric(NamedTuple):
    """Hold a checkpoint's metric: ("accuracy", "max", 0.93).

    Attributes:
      name: as `evaluate` returns it.
      mode: whether more ("max") or less ("min") is better.
      value: of this checkpoint.
    """

    name: str
    mode: str
    value: float


@dataclass(frozen=True)
class Manifest:
    """Describe a checkpoint.

    Attributes:
      position: where the run stood.
      leaves: the state's arrays, in order.
      precision: the dtype in which the steps compute.
      files: size in bytes and SHA-256 of every other file, by its path.
      versions: of txcore, jax and orbax, and the "proof" of a run that was held to a lock file.
      metric: the one that decides which checkpoint is best; None without an evaluation.
    """

    position: Position
    leaves: tuple[Leaf, ...]
    precision: str
    files: dict[str, tuple[int, str]]
    versions: dict[str, str]
    metric: Metric | None = None


def write_manifest(
    folder: Path,
    position: Position,
    leaves: tuple[Leaf, ...],
    precision: str,
    versions: dict[str, str],
    metric: Metric | None = None,
) -> None:
    """Write the manifest of a folder whose other files are complete."""
    _write_file(
        folder / NAME, Manifest(position, leaves, precision, file_digests(folder), versions, metric)
    )


def add_metric(folder: Path, metric: Metric) -> None:
    """Add a metric to a checkpoint's manifest, atomically."""
    beside = folder.parent / f".{folder.name}.{NAME}"
    _write_file(beside, replace(read_manifest(folder), metric=metric))
    os.replace(beside, folder / NAME)


def _write_file(path: Path, manifest: Manifest) -> None:
    """Write a manifest; refuse one that is too long for `read_manifest`."""
    body = asdict(manifest)
    text = json.dumps({"format": FORMAT, "version": VERSION, **body}, indent=1)
    data = f"{_hash_bytes(text.encode())}\n{text}\n".encode()
    if len(data) > MOST_BYTES:
        raise CheckpointError(
            f"{path.name} needs at most {MOST_BYTES} bytes, got {len(data)} for "
            f"{len(manifest.leaves)} leaves and {len(manifest.files)} files: stack the parameters "
            "of repeated layers, so that the state has fewer leaves"
        )
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path, *, max_bytes: int = MOST_BYTES) -> Manifest:
    """Read a checkpoint's manifest.

    Args:
      folder: the checkpoint's.
      max_bytes: the longest manifest to read, 64 MiB by default.

    Raises:
      CheckpointError: there is none, or it is too long, damaged or of another format.
    """
    path = folder / NAME
    try:
        data = read_regular(path, max_bytes)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {NAME}: it is no txcore checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    if data is None:
        raise CheckpointError(
            f"{path} is longer than {max_bytes} bytes: that is no manifest that txcore "
            "wrote; use another checkpoint"
        )
    digest, _, text = data.rstrip(b"\n").partition(b"\n")
    if digest.decode("ascii", "replace") != _hash_bytes(text):
        raise CheckpointError(f"{path} is damaged: its first line is not its SHA-256")
    try:
        manifest = _parse_manifest(
            bounded_json.loads(text, _SCHEMA, format=FORMAT, version=VERSION)
        )
        _check_name(folder.name, manifest.position.steps)
        return manifest
    except ValueError as error:
        raise CheckpointError(f"{path} {error}: use another checkpoint") from None


def _parse_manifest(data: dict[str, Any]) -> Manifest:
    leaves = tuple(Leaf(*leaf) for leaf in data["leaves"])
    for path, kind in leaves:
        _check_kind(path, kind)
    if len({leaf.path for leaf in leaves}) < len(leaves):
        raise ValueError("needs each leaf once, got one twice")
    if len(data["precision"]) > 64 or not _is_dtype(data["precision"]):
        raise ValueError(f"needs a dtype as precision, got {brief(data['precision'])}")
    metric = data.get("metric")
    return Manifest(
        position=_parse_position(data["position"]),
        leaves=leaves,
        precision=data["precision"],
        files={name: (size, digest) for name, (size, digest) in data["files"].items()},
        versions=data["versions"],
        metric=None if metric is None else Metric(metric[0], metric[1], float(metric[2])),
    )


def _parse_position(data: dict[str, Any]) -> Position:
    at = Position(**{**data, "seconds": float(data["seconds"])})
    if at.seconds < 0:
        raise ValueError(f"needs seconds of at least 0, got {at.seconds}")
    if at.batch > at.steps:
        raise ValueError(f"needs at most its {at.steps} steps as batch of a pass, got {at.batch}")
    return at


def _check_kind(path: str, kind: str) -> None:
    found = _KIND.fullmatch(kind)
    if found is None or not (found[1].startswith("key<") or _is_dtype(found[1])):
        raise ValueError(f"needs a dtype and dims of {brief(path)}, got {brief(kind)}")
    # A state without them reads them all the same, as arrays of what is written here.
    if path.startswith("loss_scaling.") and (kind != f"{found[1]}[]" or not _is_dtype(found[1])):
        raise ValueError(f"needs a scalar as {brief(path)}, got {brief(kind)}")


@functools.lru_cache(256)
def _is_dtype(name: str) -> bool:
    try:
        dtype = jnp.dtype(name)
    except (TypeError, ValueError, SyntaxError):
        return False
    is_number = jnp.issubdtype(dtype, jnp.number) or dtype == jnp.bool_
    return is_number and str(dtype) == name


def _check_name(name: str, steps: int) -> None:
    """Refuse a checkpoint whose folder's name and manifest name different steps."""
    digits = name.removeprefix(PREFIX)
    if digits != name and digits.isdecimal() and name != f"{PREFIX}{steps:08d}":
        raise ValueError(f"needs the steps of its folder, {name}, got {steps}")


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file with its digest.

    Raises:
      CheckpointError: a file is missing, was added, or was changed; the text names it.
    """
    try:
        sizes = {name: path.stat().st_size for name, path in _walk_files(folder)}
        for name in sorted({*manifest.files, *sizes}):
            _compare_file(folder, name, manifest.files.get(name), sizes.get(name))
        for name, (_, digest) in manifest.files.items():  # as long as was saved, and no longer
            if _file_sha256(folder / name) != digest:
                raise _damage_error(folder, name, "has other bytes than were saved")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from None


def _compare_file(folder: Path, name: str, want: tuple[int, str] | None, size: int | None) -> None:
    if want is None or size is None:
        raise _damage_error(
            folder, name, "is missing" if size is None else "was not there when it was saved"
        )
    if size != want[0]:
        raise _damage_error(folder, name, f"has {size} bytes, and had {want[0]} when it was saved")


def _damage_error(folder: Path, name: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{folder} is damaged: {printable(name)} {problem}")


def file_digests(folder: Path) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 of each file under `folder`, except those orbax writes later."""
    return {name: (path.stat().st_size, _file_sha256(path)) for name, path in _walk_files(folder)}


def _walk_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files of a checkpoint except its manifest."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in (*_LATE, NAME):
            yield name, path


def describe_difference(saved: tuple[Leaf, ...], own: tuple[Leaf, ...]) -> str | None:
    """Describe how a state differs from the saved one; None if it does not."""
    before, now = dict(saved), dict(own)
    texts = [f"{path} ({kind}) is not in this state" for path, kind in saved if path not in now]
    texts += [f"{path} ({kind}) is not in it" for path, kind in own if path not in before]
    texts += [
        f"{path} is {before[path]} in it and {kind} in this state"
        for path, kind in own
        if before.get(path, kind) != kind
    ]
    if len(texts) > 4:
        texts[3:] = [f"and {len(texts) - 3} more"]
    return printable("; ".join(texts)) or None


def _hash_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
