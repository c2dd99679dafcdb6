"""Record what every layer writes to the residual stream, and read the geometry of depth off it.

:func:`record` runs a language model over a corpus. For each token it stacks the stream's start
and every write to it, ``U = [h_0, Δ_1, …, Δ_ℓ]``, and keeps statistics of the Gram matrix
``G = U Uᵀ``: states are partial sums of writes, so every norm and angle follows from it.
:class:`Trajectory` gives them with standard errors over documents. Toy networks come in
through :meth:`Trajectory.from_states`. :func:`decode_early` reads the loss along depth.

Writes are recorded, not states: the difference of two large states has lost the digits that a
small write needs. Products are taken in double precision. Single precision would not do: where
an early layer writes one channel a thousand times larger than the rest and the last layer takes
it back, or where a large update is nearly parallel to its state, it misplaces angles by up to
8e-3 radians, double precision by less than 1e-9 (tests/test_trajectory.py measures both).

============= ==================================================================
file          holds
============= ==================================================================
``result``    :class:`Trajectory`: tables of every figure, averages, files
``sums``      what is kept while recording, and how a file holds it
``passing``   what hooks keep of one forward pass, and Gram matrices of it
``recorder``  :func:`record`; writes as vectors, all or a sample
``decoding``  :func:`decode_early`
============= ==================================================================
"""

from depthutil.gram import STATISTICS as STATISTICS  # its former place
from depthutil.trajectory.decoding import decode_early
from depthutil.trajectory.recorder import Sample, record, sample_writes, writes_of
from depthutil.trajectory.result import Trajectory, middle_means

__all__ = [
    "Sample",
    "Trajectory",
    "decode_early",
    "middle_means",
    "record",
    "sample_writes",
    "writes_of",
]
