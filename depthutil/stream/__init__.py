"""A live model: where its blocks are, what passes through it, and what its parts really do.

:class:`Stream` is one model, ready to be run: whoever records, decodes or intervenes goes through
:meth:`Stream.run`. Where blocks, norm and head are is first guessed from names
(:func:`anatomy`) and then found out on a few tokens (:func:`measured`).

============= ==================================================================
file          holds
============= ==================================================================
``parts``     :class:`Anatomy`: the modules that compute, and those whose outputs are added
``hooks``     :func:`hooked`, :func:`watched`, :func:`rewritten`, :func:`computing`,
              :func:`reordered`: until a block of code ends
``inputs``    a batch as the model takes it; the forward pass without the head
``measuring`` :func:`measured`
``adding``    which of a block's modules write to the stream
``identity``  :func:`fingerprint`, by which a checkpoint knows its run
``live``      :class:`Stream`
============= ==================================================================
"""

from depthutil.stream.hooks import (
    announced,
    computing,
    computing_as,
    evaluating,
    hidden,
    hooked,
    reordered,
    rewritten,
    tensor,
    watched,
    with_hidden,
    with_tensor,
)
from depthutil.stream.identity import fingerprint
from depthutil.stream.inputs import device_of, forward, inputs_of
from depthutil.stream.live import Stream
from depthutil.stream.measuring import PROBE, measured
from depthutil.stream.parts import FAMILIES, Anatomy, Write, anatomy, is_norm

__all__ = [
    "FAMILIES",
    "PROBE",
    "Anatomy",
    "Stream",
    "Write",
    "anatomy",
    "announced",
    "computing",
    "computing_as",
    "device_of",
    "evaluating",
    "fingerprint",
    "forward",
    "hidden",
    "hooked",
    "inputs_of",
    "is_norm",
    "measured",
    "reordered",
    "rewritten",
    "tensor",
    "watched",
    "with_hidden",
    "with_tensor",
]
