"""Train every student of a grid at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from depthutil import _runs
from depthutil.toy import kernels
from depthutil.toy.grid import Trainer, by_student, own_stream
from depthutil.toy.model import GRID, ToyConfig
from depthutil.toy.results import ToyResult


def train(
    config: ToyConfig,
    *,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_seconds: float = 60,
    students: bool = False,
    progress: bool | Callable[[int, int, float], None] = False,
    device: str | torch.device | None = None,
    threads: int | None = None,
    kernel: str = "auto",
    precision: str = "ieee",
    graph: bool | None = None,
) -> ToyResult:
    """Train every student of a grid at once.

    Parameters
    ----------
    config : ToyConfig
    checkpoint : path, optional
        File to save to and, where it exists, to continue from; on a CPU with the same
        number of threads, to the same bits as without an interruption.
    checkpoint_seconds : float
        Time between checkpoints.
    students : bool
        Keep the trained students, for :meth:`ToyResult.student` and
        :meth:`ToyResult.states`.
    progress : bool or callable
        Print step and time left to standard error about every ten seconds, or call
        with ``(step, steps, seconds left)`` after every step, on a GPU a few steps ahead of it.
    device : str or torch.device, optional
        A GPU where there is one, by default.
    threads : int, optional
        Cores for each operation, by default what PyTorch is set to.
    kernel, precision : str
        What computes the networks, see :func:`depthutil.toy.kernels.choose`: ``"auto"``,
        ``"torch"`` or ``"triton"``, and for the latter ``"ieee"`` (float32), ``"tf32x3"`` or
        ``"tf32"``. The choice is printed with ``progress``, and in ``ToyResult.kernel``.
    graph : bool, optional
        Record a step as a CUDA graph and replay it; on a GPU, by default, where that works.

    Returns
    -------
    ToyResult

    Raises
    ------
    FloatingPointError
        If a loss is no longer a number; the message names depth and temperature and the step,
        on a GPU a range of steps.
    ValueError
        If the checkpoint is damaged or belongs to another configuration, or if this machine
        has no such kernel or no CUDA graphs.

    Examples
    --------
    >>> config = ToyConfig(width=4, vocabulary=8, teacher_depth=8, depths=(1, 2),
    ...                    teachers=(0,), batch=16, steps=20, test_every=10)
    >>> result = train(config)
    >>> result.losses.columns.tolist()
    ['teacher', 'rho', 'temperature', 'depth', 'seed', 'step', 'loss']
    >>> len(result.losses)  # 2 rhos, 2 depths, 2 tests
    8
    """
    if not isinstance(config, ToyConfig):
        raise TypeError(f"config is a ToyConfig, not {type(config).__name__}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = None if checkpoint is None else Path(checkpoint)
    stack, choice = kernels.choose(
        kernel, device, width=config.width, dtype=config.dtype, precision=precision
    )
    if graph and device.type != "cuda":
        raise ValueError(f"a CUDA graph needs a GPU, not {device.type}: leave graph alone")
    if progress and not callable(progress):
        print(f"computed by {choice}, on {device}", file=sys.stderr, flush=True)
    with _runs.cpu(threads), own_stream(device):
        trainer = Trainer(config, device, stack, graph)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                trainer.load(path)
        earlier = trainer.seconds
        report = _runs.Progress(progress, config.steps, trainer.step)
        saved = 0.0
        while trainer.step < config.steps:
            trainer.advance()
            trainer.kernel = choice + ("; CUDA graph" if trainer.replay else "")
            report(trainer.step)
            trainer.seconds = earlier + report.seconds
            done = trainer.step == config.steps
            if path is not None and (done or report.seconds - saved >= checkpoint_seconds):
                trainer.save(path)
                saved = report.seconds
        weights = by_student(trainer) if students else {}
    return ToyResult(
        config=config,
        losses=pd.DataFrame(trainer.records, columns=[*GRID, "step", "loss"]),
        wall_seconds=trainer.seconds,
        weights=weights,
        kernel=trainer.kernel,
    )
