"""Train a whole grid of toy students at once, and read the exponent of depth off it.

:func:`train` trains every student of a :class:`ToyConfig`: teachers × rhos × temperatures ×
depths × seeds. One batch of inputs and one pass through the teacher serve every student of
that teacher, and students of one depth are stacked and stepped as one batched computation.
:func:`train_plainly` is the loop that this must equal, for one student; both know the model
from ``toy.model``. :func:`exponent` fits the power of depth, :func:`sweep` spreads grids over
machines, :func:`probe` measures how a trained student uses its depth.

============= ==================================================================
file          holds
============= ==================================================================
``model``     settings, networks, inputs and losses, as plainly as they can be written
``grid``      groups of students that are stepped together; their checkpoints
``kernels``   stacks of networks, forward and backward, in PyTorch and, in ``fused``, Triton
``training``  :func:`train`
``results``   losses and students, :func:`merge`, :func:`exponent`
``sweeps``    many grids on any executor
``probing``   from outside, from inside and by intervention: :func:`probe`
============= ==================================================================
"""

from depthutil.toy.model import (
    GRID,
    Layer,
    Network,
    ToyConfig,
    inputs,
    losses,
    rms,
    student_weights,
    targets,
    teacher_weights,
    train_plainly,
)
from depthutil.toy.probing import probe
from depthutil.toy.results import POWER_LAW, ToyResult, exponent, merge
from depthutil.toy.sweeps import SweepError, gpu_pool, shards, slug, sweep
from depthutil.toy.training import train

__all__ = [
    "GRID",
    "POWER_LAW",
    "Layer",
    "Network",
    "SweepError",
    "ToyConfig",
    "ToyResult",
    "exponent",
    "gpu_pool",
    "inputs",
    "losses",
    "merge",
    "probe",
    "rms",
    "shards",
    "slug",
    "student_weights",
    "sweep",
    "targets",
    "teacher_weights",
    "train",
    "train_plainly",
]
