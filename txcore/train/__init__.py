"""Training: the engine, the state, the step, and what they need.

Imports `_compat`, `kernels`, `kernels.common`, `later`, `launch.gloo_threads`, `mesh`, `optim`,
`outside`, `path_rules`, `plan`, `printing`, `profiling`, `profiling.audit`, `profiling.costs`,
`profiling.targets`, `train.batches`, `train.checkpoints`, `train.loop`, `train.numerics`,
`train.state`, `train.steps`.
"""

from typing import TYPE_CHECKING

from txcore.later import import_later
from txcore.train.batches.even import even_batches as even_batches
from txcore.train.batches.even import pad_batch as pad_batch
from txcore.train.engine import Engine as Engine
from txcore.train.numerics.loss_scale import LossScale as LossScale
from txcore.train.numerics.precision import Precision as Precision
from txcore.train.state.state import TrainState as TrainState
from txcore.train.steps.means import Mean as Mean
from txcore.train.steps.step_fn import StepFn as StepFn
from txcore.train.steps.step_fn import step_fn as step_fn

if TYPE_CHECKING:
    from txcore.train.checkpoints.checkpoints import Checkpoints as Checkpoints
    from txcore.train.checkpoints.loading import load_extra as load_extra
    from txcore.train.checkpoints.loading import load_params as load_params
    from txcore.train.checkpoints.manifest import CheckpointError as CheckpointError
    from txcore.train.checkpoints.manifest import Position as Position

__getattr__ = import_later(
    __name__,
    {
        "CheckpointError": "txcore.train.checkpoints.manifest",
        "Checkpoints": "txcore.train.checkpoints.checkpoints",
        "Position": "txcore.train.checkpoints.manifest",
        "load_extra": "txcore.train.checkpoints.loading",
        "load_params": "txcore.train.checkpoints.loading",
    },
)
