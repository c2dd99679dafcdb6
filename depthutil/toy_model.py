"""The former place of ``depthutil.toy.model``, for notebooks that import from here."""

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

__all__ = [
    "GRID",
    "Layer",
    "Network",
    "ToyConfig",
    "inputs",
    "losses",
    "rms",
    "student_weights",
    "targets",
    "teacher_weights",
    "train_plainly",
]
