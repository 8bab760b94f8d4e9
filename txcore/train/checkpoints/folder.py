"""The folder of a run's checkpoints: their names, who may use it, and whether there is room."""

import errno
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

from txcore.train.checkpoints.manifest import PREFIX, CheckpointError

UNFINISHED = ".orbax-checkpoint-tmp"  # what follows a name until all is written
_NAME = re.compile(rf"{PREFIX}([0-9]{{8}}|[1-9][0-9]{{8,}})")  # those that `name` makes
_SPARE = 1 << 20  # bytes that a checkpoint takes beside its arrays
_MARK = ".shared-"  # begins the name of the file by which processes see that they share the folder
_SEEN_S = 10.0  # until a file of one process is seen by all: a network file system may be late
_LOOK_S = 0.05


def absolute(directory: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a folder; a leading "~" is the user's home, as in a shell.

    Raises:
      ValueError: there is no such user.
    """
    path = os.path.expanduser(os.fspath(directory))
    if path.startswith("~"):
        raise ValueError(
            f"{os.fspath(directory)!r} begins with '~', and no home of that user is known: give "
            f"the path itself, or './{path}' for a folder of that name"
        )
    return Path(path).absolute()


def name(steps: int) -> str:
    """Return the name of the checkpoint after so many steps."""
    return f"{PREFIX}{steps:08d}"


def is_name(text: str) -> bool:
    """Tell whether a folder's name is one that `name` makes."""
    return _NAME.fullmatch(text) is not None


def names(directory: Path) -> list[str]:
    """Return the checkpoints in a folder, the newest first."""
    found = (_NAME.fullmatch(path.name) for path in directory.glob(f"{PREFIX}*"))
    return [name(n) for n in sorted((int(match[1]) for match in found if match), reverse=True)]


def take(directory: Path, *, fresh: bool) -> int:
    """Make a folder ours: writable (tried), used by no other run, without unfinished leftovers.

    Args:
      directory: the folder; made where it is missing.
      fresh: whether it must have no checkpoint yet.

    Returns:
      The descriptor of a lock, held until it is closed or the process ends.

    Raises:
      CheckpointError: it cannot be written, another run uses it, or it is not fresh.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = _lock(directory)
        _try_to_write(directory, lock)
    except OSError as error:
        raise CheckpointError(_unusable(directory, error)) from None
    found = names(directory)
    if found and fresh:
        os.close(lock)
        raise CheckpointError(
            f"{directory} has checkpoints already, the newest {found[0]}: resume from it "
            "(resume='auto'), or give another folder"
        )
    clear(directory, f"{PREFIX}*")
    return lock


def _try_to_write(directory: Path, lock: int) -> None:
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".writable", dir=directory))
    except OSError:
        os.close(lock)
        raise


def mark(directory: Path) -> str:
    """Put a file of a new name into a folder, and return its name: by it others know the folder."""
    number, path = tempfile.mkstemp(prefix=_MARK, dir=directory)
    os.close(number)
    return Path(path).name


def check_shared(directory: Path, marked: str) -> None:
    """Refuse a folder that is not process 0's, or that this process cannot write.

    Args:
      directory: as this process sees it.
      marked: the name of process 0's file in it.

    Raises:
      CheckpointError: the file is not there, or no other can be made.
    """
    if not _comes(directory / marked):
        raise CheckpointError(
            f"the checkpoint folder {directory} is not shared: a file that rank 0 made in it is "
            "not there. Give a folder on a file system that all processes share"
        )
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".writable", dir=directory))
    except OSError as error:
        raise CheckpointError(_unusable(directory, error)) from None


def _comes(path: Path) -> bool:
    """Tell whether what another process has made is seen by this one; waits for it."""
    end = time.monotonic() + _SEEN_S
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(_LOOK_S)
    return True


def unmark(directory: Path) -> None:
    """Delete the files of `mark`, also those of a run that was killed."""
    for path in directory.glob(f"{_MARK}*"):
        path.unlink(missing_ok=True)


def _unusable(directory: Path, error: OSError) -> str:
    return (
        f"the checkpoint folder {directory} cannot be used: {reason(error)}. Give one that this "
        "user may write"
    )


def unfinished(to: Path) -> Path:
    """Return where a checkpoint lies until all of it is written."""
    return to.with_name(f"{to.name}{UNFINISHED}")


def make(to: Path) -> None:
    """Make the folder in which a checkpoint is written, anew."""
    shutil.rmtree(unfinished(to), ignore_errors=True)
    unfinished(to).mkdir()


def check_made(to: Path) -> None:
    """Refuse to write where process 0's folder is not.

    Raises:
      CheckpointError: it is not there.
    """
    if not _comes(unfinished(to)):
        raise CheckpointError(
            f"{unfinished(to)}, which rank 0 has made, is not there: {to.parent} is not shared"
        )


def commit(to: Path) -> None:
    """Give a checkpoint that is whole its name, in place of another of that name."""
    if to.is_dir() and not to.is_symlink():
        shutil.rmtree(to)
    else:
        to.unlink(missing_ok=True)
    os.rename(unfinished(to), to)


def clear(directory: Path, names: str) -> None:
    """Delete what is left of checkpoints that were not finished."""
    for leftover in directory.glob(f"{names}{UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _lock(directory: Path) -> int:
    import fcntl  # not on Windows, where jax has several processes as little

    lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            os.close(lock)
            raise CheckpointError(
                f"{directory} is in use by another run: end that one, or give another folder"
            ) from None
    return lock  # a file system without locks has none to give


def no_room(directory: Path, need: int) -> str | None:
    """Return why so many bytes cannot be written, as far as that can be told before."""
    if not os.access(directory, os.W_OK | os.X_OK):
        return f"{directory} may not be written"
    need, free = need + _SPARE, shutil.disk_usage(directory).free
    if free < need:
        return f"it needs about {need:,} bytes, and its file system has {free:,} left"
    return None


def reason(error: BaseException) -> str:
    """Return an error's words on one line."""
    text = (isinstance(error, OSError) and error.strerror) or str(error) or repr(error)
    return " ".join(text.split())[:400]
