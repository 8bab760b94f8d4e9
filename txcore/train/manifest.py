"""What one checkpoint's folder holds: a file of our own beside orbax's, checked before use."""

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

NAME = "txcore.json"
FORMAT = "txcore-checkpoint"
VERSION = 1
MOST_BYTES = 1 << 26  # of the manifest
# Those that orbax writes after the last moment at which the manifest can be made.
_LATE = ("_CHECKPOINT_METADATA", "commit_success.txt")
_CHUNK = 1 << 20


class CheckpointError(RuntimeError):
    """A checkpoint cannot be made or used; says which, why, and what to do."""


@dataclass(frozen=True)
class Position:
    """Hold how far `fit` has come; with the state and the data it is the whole run.

    Attributes:
      steps: batches done, those that a loss scale skipped too.
      epoch: the pass over the data, from 0.
      batch: batches of that pass done.
      rows: of the global batches of that pass, padding among them.
      examples: real ones so far.
      seconds: of training so far; compilation, evaluation and saving left out.
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
    """Hold what an evaluation says of one checkpoint: ("accuracy", "max", 0.93).

    `mode` says whether more ("max") or less ("min") of it is better.
    """

    name: str
    mode: str
    value: float


@dataclass(frozen=True)
class Manifest:
    """Hold what a checkpoint is of.

    Attributes:
      position: where the run stood.
      leaves: the state's arrays, in order.
      precision: in which dtype the steps compute.
      files: size in bytes and SHA-256 of every file beside the manifest, by its path.
      versions: of txcore, jax and orbax.
      metric: by which the best checkpoint is kept, None where it was not evaluated.
    """

    position: Position
    leaves: tuple[Leaf, ...]
    precision: str
    files: dict[str, tuple[int, str]]
    versions: dict[str, str]
    metric: Metric | None = None


def write(
    folder: Path,
    position: Position,
    leaves: tuple[Leaf, ...],
    precision: str,
    versions: dict[str, str],
    metric: Metric | None = None,
) -> None:
    """Write the manifest of a folder whose files are all there."""
    _write(folder / NAME, Manifest(position, leaves, precision, digests(folder), versions, metric))


def add_metric(folder: Path, metric: Metric) -> None:
    """Add to a manifest what an evaluation says of its checkpoint, at once or not at all."""
    beside = folder.parent / f".{folder.name}.{NAME}"
    _write(beside, replace(read(folder), metric=metric))
    os.replace(beside, folder / NAME)


def _write(path: Path, manifest: Manifest) -> None:
    body = asdict(manifest)
    text = json.dumps({"format": FORMAT, "version": VERSION, **body}, indent=1)
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"{_sha256(text.encode())}\n{text}\n")
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
      CheckpointError: there is none, or it is damaged or of another format.
    """
    try:
        with open(folder / NAME, "rb") as file:
            digest, _, text = file.read(MOST_BYTES).rstrip(b"\n").partition(b"\n")
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {NAME}: it is no txcore checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{folder / NAME} cannot be read: {error.strerror}") from None
    if digest.decode("ascii", "replace") != _sha256(text):
        raise CheckpointError(f"{folder / NAME} is damaged: its first line is not its SHA-256")
    try:
        return _parse(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder / NAME} is no manifest of a checkpoint: {error}") from None


def _parse(data: Any) -> Manifest:
    if data["format"] != FORMAT or data["version"] != VERSION:
        raise ValueError(f"required {FORMAT} {VERSION}, got {data['format']!r} {data['version']!r}")
    kinds: dict[str, Any] = {field.name: type(field.default) for field in fields(Position)}
    position = Position(**{name: kind(data["position"][name]) for name, kind in kinds.items()})
    leaves = tuple(Leaf(str(path), str(kind)) for path, kind in data["leaves"])
    files = {str(name): (int(size), str(sha)) for name, (size, sha) in data["files"].items()}
    versions, metric = dict(data["versions"]), _parse_metric(data.get("metric"))
    return Manifest(position, leaves, str(data["precision"]), files, versions, metric)


def _parse_metric(given: Any) -> Metric | None:
    if given is None:
        return None
    name, mode, value = given
    if mode not in ("max", "min") or not math.isfinite(value):
        raise ValueError(f"required a metric with 'max' or 'min' and a finite value, got {given}")
    return Metric(str(name), str(mode), float(value))


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare every file with its digest; reads them all.

    Raises:
      CheckpointError: one is missing, has been added, or holds other bytes; it is named.
    """
    try:
        found = digests(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from None
    for name in sorted({*manifest.files, *found}):
        want, have = manifest.files.get(name), found.get(name)
        if want == have:
            continue
        problem = "has other bytes than were saved"
        if want is None or have is None:
            problem = "is missing" if have is None else "was not there when it was saved"
        elif want[0] != have[0]:
            problem = f"has {have[0]} bytes, and had {want[0]} when it was saved"
        raise CheckpointError(f"{folder} is damaged: {name} {problem}")


def digests(folder: Path) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 of each file under `folder`, but for those that come late."""
    return {
        name: (path.stat().st_size, _file_sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (name := path.relative_to(folder).as_posix()) not in (*_LATE, NAME)
    }


def difference(saved: tuple[Leaf, ...], own: tuple[Leaf, ...]) -> str | None:
    """Return how a state differs from the saved one, in words; None where it does not."""
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
    return "; ".join(texts) or None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
