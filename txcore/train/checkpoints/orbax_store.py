"""A state's arrays in a folder, by orbax: written while the run goes on, and read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from txcore.train.checkpoints import folder, manifest, saved_leaves
from txcore.train.checkpoints.manifest import CheckpointError, Leaf, Metric, Position
from txcore.train.state import TrainState

_TIMEOUT_S = 300  # for the other processes, where one cannot write


@dataclass(frozen=True)
class Writing:
    """Hold which checkpoint is under way."""

    to: Path
    position: Position
    metric: Metric | None


class Store:
    """Write one checkpoint at a time into a folder, and read any.

    Args:
      directory: where the checkpoints lie.
      name: the same on every process, and another one for each store.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._directory, self._name = directory, name
        self._checkpointer: Any = None  # orbax's, made when first needed
        self._facts: tuple[tuple[Leaf, ...], str] = (), ""
        self.writing: Writing | None = None

    def start(self, writing: Writing, state: TrainState) -> None:
        """Copy a state's arrays, and start to write them; `finish` has the errors that follow."""
        self.writing = writing
        self._facts = saved_leaves.leaves_of(state), state.precision.compute
        try:
            args = orbax().args.StandardSave(saved_leaves.to_save(state))
            self._orbax().save(writing.to, args=args, force=True)
        except BaseException:
            self.writing = None
            raise

    def finish(self) -> None:
        """Wait until what is under way is whole."""
        try:
            self._orbax().wait_until_finished()
        finally:
            self.writing = None

    def read(self, saved: Path, state: TrainState) -> TrainState:
        """Return the checkpoint's arrays in the layout of `state`."""
        there = manifest.read(saved).leaves
        wanted = saved_leaves.to_read(there, state)
        found = self._orbax().restore(saved, args=orbax().args.StandardRestore(wanted))
        return saved_leaves.filled(state, there, found)

    def _orbax(self) -> Any:
        if self._checkpointer is None:
            ocp = orbax()
            everyone = set(range(jax.process_count()))
            self._checkpointer = ocp.AsyncCheckpointer(
                ocp.StandardCheckpointHandler(),
                async_options=ocp.AsyncOptions(
                    timeout_secs=_TIMEOUT_S, post_finalization_callback=self._complete
                ),
                # Named, the processes meet at the coordinator; else orbax runs a collective.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    active_processes=everyone, barrier_sync_key_prefix=self._name
                ),
            )
        return self._checkpointer

    def _complete(self) -> None:
        """Add the manifest to orbax's folder, just before it gets its name."""
        assert self.writing is not None
        made, (leaves, precision) = self.writing, self._facts
        (unfinished,) = self._directory.glob(f"{made.to.name}{folder.UNFINISHED}")
        manifest.write(unfinished, made.position, leaves, precision, _versions(), made.metric)


def read_arrays(saved: Path, numbers: list[str]) -> dict[str, Any]:
    """Return some of a checkpoint's arrays on the host, without any other process."""
    ocp = orbax()
    item = dict.fromkeys(numbers, 0)
    kinds = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in numbers}
    args = ocp.args.PyTreeRestore(item=item, restore_args=kinds, partial_restore=True)
    return ocp.PyTreeCheckpointHandler().restore(saved, args=args)


def orbax() -> Any:
    """Return orbax.checkpoint, which is imported where it is first needed.

    Raises:
      CheckpointError: it is not installed.
    """
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise CheckpointError(
            "checkpoints need the package orbax-checkpoint: pip install 'txcore[checkpoints]'"
        ) from None
    return ocp


def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in ("txcore", "jax", "orbax-checkpoint"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # used from a folder, without being installed
            found[name] = "unknown"
    return found
