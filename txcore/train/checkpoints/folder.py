"""Manage the folder of a run's checkpoints: names, the lock, sharing, and free space."""

import errno
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

from txcore.train.checkpoints.manifest import PREFIX, CheckpointError

UNFINISHED = ".orbax-checkpoint-tmp"  # suffix of a name until the checkpoint is whole
_NAME = re.compile(rf"{PREFIX}([0-9]{{8}}|[1-9][0-9]{{8,}})")  # as `checkpoint_name` makes them
_SPARE = 1 << 20  # bytes of a checkpoint besides its arrays
_MARK = ".shared-"  # prefix of the file that shows all processes that they share the folder
_SEEN_S = 10.0  # for all processes to see a new file: a network file system may be late
_LOOK_S = 0.05  # between two looks


def absolute_path(directory: str | os.PathLike[str]) -> Path:
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


def checkpoint_name(steps: int) -> str:
    """Return the name of the checkpoint that is made after `steps` steps."""
    return f"{PREFIX}{steps:08d}"


def is_checkpoint_name(text: str) -> bool:
    """Tell whether a name is that of a complete checkpoint."""
    return _NAME.fullmatch(text) is not None


def list_checkpoints(directory: Path) -> list[str]:
    """Return the checkpoints in a folder, the newest first."""
    found = (_NAME.fullmatch(path.name) for path in directory.glob(f"{PREFIX}*"))
    return [
        checkpoint_name(n)
        for n in sorted((int(match[1]) for match in found if match), reverse=True)
    ]


def take_folder(directory: Path, *, fresh: bool) -> int:
    """Lock a folder for this run, check that it is writable, and delete unfinished checkpoints.

    Args:
      directory: the folder; made if it is missing.
      fresh: whether it must have no checkpoint yet.

    Returns:
      The descriptor of a lock, held until it is closed or the process ends.

    Raises:
      CheckpointError: it cannot be written, another run uses it, or it is not fresh.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = _lock_folder(directory)
        _try_to_write(directory, lock)
    except OSError as error:
        raise CheckpointError(_describe_unusable(directory, error)) from None
    found = list_checkpoints(directory)
    if found and fresh:
        os.close(lock)
        raise CheckpointError(
            f"{directory} has checkpoints already, the newest {found[0]}: resume from it "
            "(resume='auto'), or give another folder"
        )
    delete_unfinished(directory, f"{PREFIX}*")
    return lock


def _try_to_write(directory: Path, lock: int) -> None:
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".writable", dir=directory))
    except OSError:
        os.close(lock)
        raise


def make_mark(directory: Path) -> str:
    """Make a file with a new name in a folder, so that others recognize the folder; return it."""
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
    if not _wait_for_path(directory / marked):
        raise CheckpointError(
            f"the checkpoint folder {directory} is not shared: a file that rank 0 made in it is "
            "not there. Give a folder on a file system that all processes share"
        )
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".writable", dir=directory))
    except OSError as error:
        raise CheckpointError(_describe_unusable(directory, error)) from None


def _wait_for_path(path: Path) -> bool:
    """Wait until this process sees a path that another one has made; tell whether it does."""
    end = time.monotonic() + _SEEN_S
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(_LOOK_S)
    return True


def delete_marks(directory: Path) -> None:
    """Delete the files of `make_mark`, also those of a run that was killed."""
    for path in directory.glob(f"{_MARK}*"):
        path.unlink(missing_ok=True)


def _describe_unusable(directory: Path, error: OSError) -> str:
    return (
        f"the checkpoint folder {directory} cannot be used: {describe_error(error)}. Give one that "
        "this user may write"
    )


def unfinished_path(to: Path) -> Path:
    """Return the path of a checkpoint until it is complete."""
    return to.with_name(f"{to.name}{UNFINISHED}")


def make_unfinished(to: Path) -> None:
    """Make an empty folder to write a checkpoint into."""
    shutil.rmtree(unfinished_path(to), ignore_errors=True)
    unfinished_path(to).mkdir()


def check_made(to: Path) -> None:
    """Refuse to write if the folder that process 0 has made is missing.

    Raises:
      CheckpointError: it is missing.
    """
    if not _wait_for_path(unfinished_path(to)):
        raise CheckpointError(
            f"{unfinished_path(to)}, which rank 0 has made, is not there: {to.parent} is not shared"
        )


def commit_finished(to: Path) -> None:
    """Rename a whole checkpoint to its final name, replacing another one."""
    if to.is_dir() and not to.is_symlink():
        shutil.rmtree(to)
    else:
        to.unlink(missing_ok=True)
    os.rename(unfinished_path(to), to)


def delete_unfinished(directory: Path, names: str) -> None:
    """Delete unfinished checkpoints."""
    for leftover in directory.glob(f"{names}{UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _lock_folder(directory: Path) -> int:
    import fcntl  # missing on Windows, where jax does not run in several processes either

    lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            os.close(lock)
            raise CheckpointError(
                f"{directory} is in use by another run: end that one, or give another folder"
            ) from None
    return lock  # unlocked on a file system without locks


def describe_shortage(directory: Path, need: int) -> str | None:
    """Return why so many bytes cannot be written, None if nothing speaks against it."""
    if not os.access(directory, os.W_OK | os.X_OK):
        return f"{directory} may not be written"
    need, free = need + _SPARE, shutil.disk_usage(directory).free
    if free < need:
        return f"it needs about {need:,} bytes, and its file system has {free:,} left"
    return None


def describe_error(error: BaseException) -> str:
    """Return an error's text on one line."""
    text = (isinstance(error, OSError) and error.strerror) or str(error) or repr(error)
    return " ".join(text.split())[:400]
