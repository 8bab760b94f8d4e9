"""Download MNIST, once, whole and checked.

Y. LeCun, C. Cortes, C. Burges: The MNIST database of handwritten digits (1998).
"""

import argparse
import contextlib
import dataclasses
import hashlib
import http.client
import os
import pathlib
import secrets
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator

from data.files import NAMES, NPZ, locate
from data.idx import DataError, data_error, open_regular


@dataclasses.dataclass(frozen=True)
class Canonical:
    """What a downloaded file must be."""

    size_bytes: int
    md5: str


MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_CANONICAL = (
    Canonical(9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
    Canonical(28_881, "d53e105ee54ea40749a09fcbcd1e9432"),
    Canonical(1_648_877, "9fb629c4189551a2d022fa330f9573f3"),
    Canonical(4_542, "ec29112dd5afa0611ce80d1b7f02629c"),
)
FILES = dict(zip(NAMES, _CANONICAL, strict=True))
SILENCE_S = 10.0  # give up on a mirror that sends nothing for so long
FILE_S = 300.0  # or that has not sent the whole file by then
_PIECE_BYTES = 1 << 16


def data_folder(data_dir: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Return the folder of the MNIST files.

    Args:
      data_dir: the user's choice; None takes the environment variable TXCORE_DATA, and where
        that is not set, data/mnist under the current folder.

    Returns:
      The folder, which need not exist; ~ is expanded.

    Raises:
      DataError: it begins with ~ and a name that no user has.

    Example:
      >>> data_folder("my/mnist").as_posix()
      'my/mnist'
    """
    named = pathlib.Path(data_dir or os.environ.get("TXCORE_DATA") or "data/mnist")
    try:
        return named.expanduser()
    except RuntimeError:  # ~nobody
        raise data_error(named, "a folder", "no such user's", "write the path out") from None


def ensure(
    data_dir: str | os.PathLike[str] | None = None,
    *,
    rank: int = 0,
    barrier: Callable[[str], object] = lambda name: None,
) -> pathlib.Path:
    """Download what is not in the folder; rank 0 does, the others wait.

    A set that is there, under any of its usual names (`files.locate`), is left alone and not
    checked: the reader checks its format. A part of one is completed where it is of MNIST's own
    files, by size and checksum: the rest of another set would go by unseen.

    Args:
      data_dir: as in `data_folder`.
      rank: of this process.
      barrier: called once, with a name, by every rank; returns when all ranks have called it.

    Returns:
      The folder, in which the four files are.

    Raises:
      DataError: the files could not be downloaded or written, this rank does not see them, or the
        folder holds two sets, a part of one, or data that is not read here.

    Example:
      >>> import tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> for name in FILES:
      ...     (folder / name).touch()
      >>> ensure(folder) == folder
      True
    """
    folder = data_folder(data_dir)
    try:
        if rank == 0:
            _download_missing(folder)
    finally:  # also after a failure: the other ranks are waiting
        barrier("mnist-download")
    # The other ranks look only now: before, a network file system may remember "not there".
    missing = _missing(folder)
    if missing:
        raise data_error(
            folder,
            f"the {len(FILES)} MNIST files on every rank",
            f"no {', '.join(missing)} on rank {rank}",
            "see rank 0 for a failed download, or set --data-dir or TXCORE_DATA to a folder "
            "that every host sees",
        )
    return folder


def _missing(folder: pathlib.Path) -> list[str]:
    """Return the names of the files that are not there."""
    found = locate(folder)
    return [] if NPZ in found else [name for name in FILES if name not in found]


def _download_missing(folder: pathlib.Path) -> None:
    missing = _missing(folder)
    if missing:
        _check_rest(folder)
    for name in missing:
        path = folder / f"{name}.gz"
        _make_folder(folder)  # before the download, so that it is not for nothing
        _write_atomically(path, _from_any_mirror(path, FILES[name]))


def _check_rest(folder: pathlib.Path) -> None:
    """Refuse a part of a set to which MNIST's own files need not belong."""
    found = locate(folder)
    for name, path in found.items():
        canonical = FILES[name]
        if path.parent != folder or Canonical(*_size_and_md5(path)) != canonical:
            missing = next(other for other in FILES if other not in found)
            raise data_error(
                folder,
                "all four files of a set",
                f"{path.relative_to(folder)} and no {missing}",
                f"put {missing} of the same set there, or name a new folder to download MNIST to",
            )


def _size_and_md5(path: pathlib.Path) -> tuple[int, str]:
    try:
        with open_regular(path) as file:
            data = file.read(max(each.size_bytes for each in FILES.values()) + 1)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise data_error(path, "a file to read", reason, "give one that you may read") from None
    return len(data), hashlib.md5(data, usedforsecurity=False).hexdigest()


def _from_any_mirror(path: pathlib.Path, canonical: Canonical) -> bytes:
    """Return the content of a file from the first mirror that has it whole."""
    failures = []
    for mirror in MIRRORS:
        try:
            return _from_mirror(mirror + path.name, canonical)
        except (OSError, http.client.HTTPException, DataError) as error:
            failures.append(f"{mirror} gave: {_one_line(error)}")
    raise data_error(
        path,
        f"a download from one of {len(MIRRORS)} mirrors",
        " and ".join(failures),
        "check the network, or copy the four files to a folder and name it with --data-dir "
        "or TXCORE_DATA",
    )


def _from_mirror(url: str, canonical: Canonical) -> bytes:
    """Return the content of `url`, which is small enough to be checked before it is written."""
    size, md5 = canonical.size_bytes, canonical.md5
    with (
        _progress(url, size) as advance,
        urllib.request.urlopen(url, timeout=SILENCE_S) as response,
    ):
        if response.status != 200:
            raise DataError(f"HTTP status {response.status} instead of 200")
        data = bytearray()
        deadline = time.monotonic() + FILE_S
        # read1 takes what has come: read would wait for a whole piece, however slow.
        while piece := response.read1(min(_PIECE_BYTES, size + 1 - len(data))):
            data += piece
            advance(len(piece))
            if time.monotonic() > deadline:
                raise DataError(f"{len(data)} of {size} bytes in {FILE_S:.0f} s")
    if len(data) != size:
        found = "more" if len(data) > size else len(data)
        raise DataError(f"{found} instead of {size} bytes")
    found_md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found_md5 != md5:
        raise DataError(f"md5 {found_md5} instead of {md5}")
    return bytes(data)


@contextlib.contextmanager
def _progress(url: str, total_bytes: int) -> Iterator[Callable[[int], object]]:
    """Show a bar on a terminal that has tqdm, else one line; yield what takes the bytes."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None or not sys.stderr.isatty():
        print(f"downloading {url} ({total_bytes / 1e6:.1f} MB)", file=sys.stderr)
        yield lambda count: None
        return
    name = url.rsplit("/", 1)[1]
    with tqdm(total=total_bytes, desc=name, unit="B", unit_scale=True, file=sys.stderr) as bar:
        yield bar.update


def _make_folder(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(folder, error) from None


def _write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Write the file so that under its name there is never a part of it, however we end."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise _not_writable(path.parent, error) from None
    finally:
        with contextlib.suppress(OSError):  # it is not there after the replacement
            part.unlink()


def _not_writable(folder: pathlib.Path, error: OSError) -> DataError:
    return data_error(
        folder,
        "a folder to write to, with 12 MB free",
        (error.strerror or str(error)).lower(),
        "name another with --data-dir or TXCORE_DATA",
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main(arguments: list[str] | None = None) -> int:
    """Run the script.

    Args:
      arguments: of the command line; None takes those of the process.

    Returns:
      The exit code: 0, or 1 after an error, printed in one line.
    """
    parser = argparse.ArgumentParser(description="Download MNIST, once, whole and checked.")
    parser.add_argument("--data-dir", help="the folder (default: $TXCORE_DATA, then data/mnist)")
    try:
        folder = ensure(parser.parse_args(arguments).data_dir)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"MNIST is in {folder}")
    return 0
