"""The folder of a run's checkpoints: their names, who may use it, and whether there is room."""

import errno
import os
import re
import shutil
import tempfile
from pathlib import Path

from txcore.train.checkpoints.manifest import PREFIX, CheckpointError

UNFINISHED = ".orbax-checkpoint-tmp*"  # what orbax appends to a name until all is written
_NAME = re.compile(rf"{PREFIX}([0-9]{{8}}|[1-9][0-9]{{8,}})")  # those that `name` makes
_SPARE = 1 << 20  # bytes that a checkpoint takes beside its arrays


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
        raise CheckpointError(
            f"the checkpoint folder {directory} cannot be used: {reason(error)}. Give one that "
            "this user may write"
        ) from None
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


def clear(directory: Path, names: str) -> None:
    """Delete what is left of checkpoints that were not finished."""
    for leftover in directory.glob(f"{names}{UNFINISHED}"):
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
