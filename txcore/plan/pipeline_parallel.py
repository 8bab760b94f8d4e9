"""Pipeline parallelism: layers lie on the devices of an axis, the batch goes through in parts."""

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Literal, get_args

from txcore.kernels.common.checks import whole_number

if TYPE_CHECKING:
    from txcore.parallel.pipeline.schedule import Schedule

ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zb-h1"]


@dataclass(frozen=True)
class PP:
    """Pipeline parallelism: the layers in `params["blocks"]` lie on the devices along `axis`.

    Args:
      axis: mesh axis name; each of its devices is a stage.
      microbatches: the number of parts of each device's batch, which go through one after another.
      schedule: what a stage does when, as `tx.pipeline.make_schedule` has them.
      chunks: of "interleaved" and "gpipe", the number of chunks of layers on each stage.

    Example:
      >>> tx.PP("pipe", microbatches=8)
      PP('pipe', microbatches=8, schedule='1f1b')
    """

    axis: str
    _: KW_ONLY
    microbatches: int
    schedule: ScheduleName = "1f1b"
    chunks: int = 1

    def __repr__(self) -> str:
        chunks = f", chunks={self.chunks}" if self.chunks != 1 else ""
        return (
            f"PP({self.axis!r}, microbatches={self.microbatches}, schedule={self.schedule!r}"
            f"{chunks})"
        )

    def __post_init__(self) -> None:
        if not isinstance(self.axis, str):
            raise TypeError(f"PP needs axis= one mesh axis name, got {self.axis!r}")
        if self.schedule not in get_args(ScheduleName):
            raise ValueError(
                f"PP needs schedule= one of {', '.join(map(repr, get_args(ScheduleName)))}, got "
                f"{self.schedule!r}"
            )
        if (whole_number(self.microbatches) or 0) < 1:
            raise ValueError(f"PP needs microbatches= a count from 1 on, got {self.microbatches!r}")
        if (whole_number(self.chunks) or 0) < 1:
            raise ValueError(f"PP needs chunks= a count from 1 on, got {self.chunks!r}")
        if self.chunks == 1 and self.schedule == "interleaved":
            raise ValueError(
                "PP needs chunks= 2 or more with schedule='interleaved', got 1: of one chunk of "
                "layers on a stage it is schedule='1f1b'"
            )
        if self.chunks > 1 and self.schedule not in ("gpipe", "interleaved"):
            raise ValueError(
                f"PP needs schedule= 'interleaved' or 'gpipe' with chunks={self.chunks}, got "
                f"{self.schedule!r}: it has one chunk of layers on a stage"
            )

    def make_schedule(self, stages: int) -> "Schedule":
        """Return the schedule for so many stages."""
        from txcore.parallel.pipeline.making import make_schedule  # by those alone who have stages

        return make_schedule(
            self.schedule, stages=stages, microbatches=self.microbatches, chunks=self.chunks
        )
