"""txcore: explicit collectives for JAX, and proof of what is on the wire.

    import txcore as tx

Importing it starts no backend.
"""

from typing import TYPE_CHECKING

from txcore import collectives as collectives
from txcore import kernels as kernels
from txcore import mesh as mesh
from txcore import optim as optim
from txcore.collectives import all_gather as all_gather
from txcore.collectives import all_to_all as all_to_all
from txcore.collectives import axis_index as axis_index
from txcore.collectives import axis_size as axis_size
from txcore.collectives import broadcast as broadcast
from txcore.collectives import pmax as pmax
from txcore.collectives import pmean as pmean
from txcore.collectives import pmin as pmin
from txcore.collectives import ppermute as ppermute
from txcore.collectives import psum as psum
from txcore.collectives import psum_scatter as psum_scatter
from txcore.collectives import pvary as pvary
from txcore.collectives import reduce_scatter as reduce_scatter
from txcore.collectives import shift as shift
from txcore.collectives import vary as vary
from txcore.errors import TxcoreError as TxcoreError
from txcore.later import import_later
from txcore.launch.key_value import barrier as barrier
from txcore.mesh import DeviceGroup as DeviceGroup
from txcore.mesh import MeshSpec as MeshSpec
from txcore.parallel import batch_moments as batch_moments
from txcore.parallel import example_mean as example_mean
from txcore.parallel import grad as grad
from txcore.parallel import value_and_grad as value_and_grad
from txcore.parallel import zero as zero
from txcore.parallel.gradients import Buckets as Buckets
from txcore.parallel.gradients import compression as compression
from txcore.parallel.gradients import sync_gradients as sync_gradients
from txcore.plan.data_parallel import DP as DP
from txcore.plan.pipeline_parallel import PP as PP
from txcore.plan.plan import Plan as Plan
from txcore.plan.tensor_parallel import TP as TP
from txcore.train import Engine as Engine
from txcore.train import LossScale as LossScale
from txcore.train import Mean as Mean
from txcore.train import Precision as Precision
from txcore.train import TrainState as TrainState
from txcore.train import even_batches as even_batches
from txcore.train import loggers as loggers
from txcore.train import pad_batch as pad_batch
from txcore.train import step_fn as step_fn
from txcore.version import VERSION

if TYPE_CHECKING:
    from txcore import testing as testing
    from txcore.launch import initialize as initialize
    from txcore.parallel import context as context
    from txcore.parallel import pipeline as pipeline
    from txcore.parallel import tensor as tensor
    from txcore.profiling.gate.attested import attested as attested
    from txcore.profiling.trace.record import profile as profile
    from txcore.train import CheckpointError as CheckpointError
    from txcore.train import Checkpoints as Checkpoints
    from txcore.train import load_extra as load_extra
    from txcore.train import load_params as load_params

__version__ = VERSION

# Only who names these waits for them: all together would be a third of the import.
_LATER = {
    "attested": "txcore.profiling.gate.attested",
    "CheckpointError": "txcore.train",
    "Checkpoints": "txcore.train",
    "initialize": "txcore.launch",
    "load_extra": "txcore.train",
    "load_params": "txcore.train",
    "profile": "txcore.profiling.trace.record",
}
_LATER_ROOMS = {
    "context": "txcore.parallel.context",
    "pipeline": "txcore.parallel.pipeline",
    "tensor": "txcore.parallel.tensor",
    "testing": "txcore.testing",
}
_import_later = import_later(__name__, _LATER, _LATER_ROOMS)


def __getattr__(name: str) -> object:
    if name == "ProcessGroup":  # for one release
        return mesh.__getattr__(name)
    return _import_later(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, *_LATER_ROOMS})
