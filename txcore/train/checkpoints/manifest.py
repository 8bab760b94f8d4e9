"""What one checkpoint's folder holds: a file of our own beside orbax's, checked before use."""

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from txcore.errors import TxcoreError

NAME = "txcore.json"
FORMAT = "txcore-checkpoint"
VERSION = 1
MOST_BYTES = 1 << 26  # of the manifest
# Those that orbax writes after the last moment at which the manifest can be made.
_LATE = ("_CHECKPOINT_METADATA", "commit_success.txt")
_CHUNK = 1 << 20
_MOST = 1 << 62  # of steps, rows, bytes


class CheckpointError(TxcoreError, RuntimeError):
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


def read(folder: Path, *, max_bytes: int = MOST_BYTES) -> Manifest:
    """Read a checkpoint's manifest.

    Args:
      folder: the checkpoint's.
      max_bytes: the longest manifest to read, 64 MiB by default.

    Raises:
      CheckpointError: there is none, or it is too long, damaged or of another format.
    """
    try:
        with open(folder / NAME, "rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {NAME}: it is no txcore checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{folder / NAME} cannot be read: {error.strerror}") from None
    if len(data) > max_bytes:
        raise CheckpointError(
            f"{folder / NAME} is longer than {max_bytes} bytes: that is no manifest that txcore "
            "wrote; use another checkpoint"
        )
    digest, _, text = data.rstrip(b"\n").partition(b"\n")
    if digest.decode("ascii", "replace") != _sha256(text):
        raise CheckpointError(f"{folder / NAME} is damaged: its first line is not its SHA-256")
    try:
        return _parse(
            json.loads(
                text, object_pairs_hook=_each_once, parse_int=_short, parse_constant=_no_number
            )
        )
    except KeyError as error:
        problem = f"it lacks {error}"
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        problem = str(error)
    raise CheckpointError(f"{folder / NAME} is no manifest of a checkpoint: {problem}")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:  # json alone would keep the last one
            raise ValueError(f"required each name once, got {_brief(name)} twice")
        found[name] = value
    return found


def _short(digits: str) -> int:
    if len(digits) > 18:
        raise ValueError(f"required numbers of at most 18 digits, got one of {len(digits)}")
    return int(digits)


def _no_number(text: str) -> Any:
    raise ValueError(f"required finite numbers, got {text}")


def _brief(value: Any) -> str:
    """Quote a value that may be anything: short, and on one line."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parse(data: Any) -> Manifest:
    data = _typed(data, dict, "the manifest")
    given = data["format"], data["version"]
    if type(given[1]) is not int or given != (FORMAT, VERSION):
        raise ValueError(f"required {FORMAT} {VERSION}, got {' '.join(map(_brief, given))}")
    position = _typed(data["position"], dict, "position")
    kinds: dict[str, Any] = {field.name: type(field.default) for field in fields(Position)}
    at = {name: _count(position[name], kind, name) for name, kind in kinds.items()}
    leaves = [_texts(leaf, 2, "a leaf") for leaf in _typed(data["leaves"], list, "leaves")]
    return Manifest(
        position=Position(**at),
        leaves=tuple(Leaf(path, kind) for path, kind in leaves),
        precision=_typed(data["precision"], str, "precision"),
        files={
            name: _size_and_digest(found, name)
            for name, found in _typed(data["files"], dict, "files").items()
        },
        versions={
            name: _typed(version, str, f"version of {_brief(name)}")
            for name, version in _typed(data["versions"], dict, "versions").items()
        },
        metric=_metric(data.get("metric")),
    )


def _metric(given: Any) -> Metric | None:
    if given is None:
        return None
    values = _typed(given, list, "metric")
    if len(values) != 3:
        raise ValueError(f"required a name, a mode and a value as metric, got {len(values)} values")
    name, mode = _texts(values[:2], 2, "name and mode of the metric")
    value = values[2]
    is_number = type(value) in (int, float) and abs(value) < math.inf
    if mode not in ("max", "min") or not is_number:
        raise ValueError(
            f"required a metric with 'max' or 'min' and a finite value, got {_brief(given)}"
        )
    return Metric(name, mode, float(value))


def _typed(value: Any, wanted: type, where: str) -> Any:
    if type(value) is not wanted:  # not isinstance: a bool is no number here
        raise ValueError(f"required {wanted.__name__} as {where}, got {_brief(value)}")
    return value


def _count(value: Any, kind: type, where: str) -> Any:
    """Return a number of steps or seconds, where it can be one."""
    is_one = type(value) is int or (kind is float and type(value) is float)
    if not is_one or not 0 <= value < _MOST or not math.isfinite(value):
        raise ValueError(f"required a number of at least 0 as {where}, got {_brief(value)}")
    return kind(value)


def _texts(value: Any, number: int, where: str) -> list[str]:
    listed = _typed(value, list, where)
    if len(listed) != number:
        raise ValueError(f"required {number} texts as {where}, got {len(listed)}")
    return [_typed(text, str, where) for text in listed]


def _size_and_digest(value: Any, name: str) -> tuple[int, str]:
    where = f"size and digest of {_brief(name)}"
    if len(_typed(value, list, where)) != 2:
        raise ValueError(f"required two values as {where}, got {len(value)}")
    return _count(value[0], int, where), _typed(value[1], str, where)


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
