"""Many grids: one after another, side by side, or over machines."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    as_completed,
)
from dataclasses import asdict, replace
from functools import partial
from inspect import signature
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from depthutil.toy.model import ToyConfig
from depthutil.toy.results import ToyResult, some
from depthutil.toy.training import train


def shards(config: ToyConfig) -> list[ToyConfig]:
    """The grid as independent grids of one teacher and one rho each, teacher by teacher.

    Examples
    --------
    >>> [(s.teachers, s.rhos) for s in shards(ToyConfig(teachers=(0, 1), rhos=(1.0, 0.0)))]
    [((0,), (1.0,)), ((0,), (0.0,)), ((1,), (1.0,)), ((1,), (0.0,))]
    """
    pairs = itertools.product(config.teachers, config.rhos)
    return [replace(config, teachers=(teacher,), rhos=(rho,)) for teacher, rho in pairs]


class SweepError(RuntimeError):
    """Some grids of a :func:`sweep` were not trained to their end; the others are here.

    Attributes
    ----------
    results : list
        In the order of the grids, each one's ``ToyResult``, or None.
    errors : dict
        What stopped a grid, by its place among them.
    """

    def __init__(
        self,
        message: str,
        results: Sequence[ToyResult | None] = (),
        errors: dict[int, Exception] | None = None,
    ):
        super().__init__(message)
        self.results, self.errors = list(results), dict(errors or {})


def sweep(
    configs: Sequence[ToyConfig],
    executor: Executor | None = None,
    *,
    checkpoints: str | os.PathLike | None = None,
    threads: int | None = None,
    progress: bool = False,
    **options: Any,
) -> list[ToyResult]:
    """Train several grids, here one after another or side by side on an executor's workers.

    Parameters
    ----------
    configs : sequence of ToyConfig
        For instance from :func:`shards`.
    executor : concurrent.futures.Executor, optional
        Any: a ``ProcessPoolExecutor``, :func:`gpu_pool`, or
        ``distributed.Client(...).get_executor()`` for a cluster. Workers use one thread each
        unless ``threads`` says otherwise.
    checkpoints : path, optional
        Folder, which all workers reach, for a checkpoint of each grid. Call again with
        the same arguments after a worker died: what is done is read, the rest goes on.
    threads : int, optional
        Cores for each grid, as in :func:`train`.
    progress : bool
        Print a line to standard error whenever a grid is finished.
    **options
        Passed to :func:`train`.

    Returns
    -------
    list of ToyResult
        In the order of ``configs``.

    Raises
    ------
    SweepError
        If grids failed or lost their worker, after all others have finished; it names
        them and holds the results of the others.
    ValueError
        If two grids would share a checkpoint.

    Examples
    --------
    >>> from depthutil.toy import merge
    >>> config = ToyConfig(width=4, vocabulary=8, teacher_depth=8, depths=(1, 2),
    ...                    teachers=(0, 1), batch=16, steps=20, test_every=10)
    >>> merge(sweep(shards(config))).config.teachers
    (0, 1)
    """
    configs = list(configs)
    for config in configs:
        signature(train).bind(config, checkpoint=None, **options)  # a wrong option fails once
        if not isinstance(config, ToyConfig):
            raise TypeError(f"configs are ToyConfigs, not {type(config).__name__}")
    names = [slug(config) for config in configs]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice and checkpoints is not None:
        raise ValueError(
            f"two of the configs have the checkpoint {twice}.pt: keep the one with more "
            "steps, whose result's until() has the other's"
        )
    # A worker's current folder may be another.
    folder = None if checkpoints is None else Path(checkpoints).resolve()
    options["progress"] = progress and executor is None
    options["threads"] = threads if executor is None else threads or 1
    jobs = [options | {"checkpoint": folder and folder / f"{name}.pt"} for name in names]
    results: list[ToyResult | None] = [None] * len(configs)
    errors: dict[int, Exception] = {}
    begin = time.perf_counter()
    for count, (i, result) in enumerate(_finished(configs, jobs, executor), 1):
        try:
            results[i] = result()
        except Exception as error:
            errors[i] = error
        if progress:
            minutes = (time.perf_counter() - begin) / 60
            ended = "failed" if i in errors else "finished"
            line = f"grid {count} of {len(configs)} {ended} after {minutes:.1f} min: {names[i]}"
            print(line, file=sys.stderr, flush=True)
    if errors:
        message = _what_failed(names, errors, folder)
        raise SweepError(message, results, errors) from next(iter(errors.values()))
    return [result for result in results if result is not None]  # which are all of them


def _finished(
    configs: Sequence[ToyConfig], jobs: Sequence[dict[str, Any]], executor: Executor | None
) -> Iterator[tuple[int, Callable[[], ToyResult]]]:
    """The place of each grid and what returns its result, as they end."""
    if executor is None:
        for i, (config, job) in enumerate(zip(configs, jobs, strict=True)):
            yield i, partial(train, config, **job)
        return
    futures: dict[Future, int] = {}
    for i, (config, job) in enumerate(zip(configs, jobs, strict=True)):
        try:
            future = executor.submit(_train_grid, config, job, uuid.uuid4().hex)
        except BrokenExecutor as error:  # a process died while others were still waiting
            future = Future()
            future.set_exception(error)
        futures[future] = i
    try:
        for future in as_completed(futures):
            yield futures[future], future.result
    finally:
        for future in futures:  # after Ctrl-C; what has ended is left alone
            future.cancel()


def _train_grid(config: ToyConfig, job: dict[str, Any], call: str) -> ToyResult:
    """Train on a worker; by ``call``, which is new every time, no two calls are equal.

    Dask answers a call that equals an earlier one with what it remembers, errors included.
    """
    return train(config, **job)


def _what_failed(names: Sequence[str], errors: dict[int, Exception], folder: Path | None) -> str:
    said: dict[str, list[str]] = {}
    for i, error in sorted(errors.items()):
        said.setdefault(f"{type(error).__name__}: {' '.join(str(error).split())}", []).append(
            names[i]
        )
    what = "; ".join(f"{some(grids)} ({text})" for text, grids in said.items())
    failed = f"{len(errors)} of {len(names)} grids have not reached their end: {what}"
    if folder is None:
        return f"{failed}. This error has the others' results; with checkpoints they were kept"
    again = "Call again with the same arguments"
    if any(isinstance(error, BrokenExecutor) for error in errors.values()):
        again += " and a new executor (a pool does not survive the death of a process)"
    return f"{failed}. {again}: what is done is read from {folder}, the rest goes on"


def gpu_pool(gpus: Sequence[int | str] | None = None) -> ProcessPoolExecutor:
    """An executor for :func:`sweep` with one process for each GPU of this machine.

    Parameters
    ----------
    gpus : sequence of int or str, optional
        As in the environment variable ``CUDA_VISIBLE_DEVICES``: numbers or UUIDs. By
        default all that PyTorch sees.

    Raises
    ------
    RuntimeError
        If none is given and there is none.
    """
    if gpus is None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        count = torch.cuda.device_count()
        gpus = visible.split(",")[:count] if visible else range(count)
    if not gpus:
        raise RuntimeError("PyTorch sees no GPU here: use ProcessPoolExecutor for the CPU's cores")
    # A fresh interpreter: CUDA does not survive a fork.
    context = get_context("spawn")
    queue = context.SimpleQueue()
    for gpu in gpus:
        queue.put(str(gpu).strip())
    return ProcessPoolExecutor(len(gpus), context, _see_one_gpu, (queue,))


def _see_one_gpu(queue: Any) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = queue.get()  # before PyTorch looks for GPUs


def slug(config: ToyConfig) -> str:
    """A file name for a grid: the same settings, the same name.

    Examples
    --------
    >>> slug(ToyConfig(teachers=(0,), rhos=(1.0,)))
    'teacher0_rho1_...'
    """
    # Steps that only continue a run, and what it is called, leave its name alone.
    skip = {"scale"} if config.decay else {"scale", "steps"}
    settings = {k: v for k, v in asdict(config).items() if k not in skip}
    digest = np.random.SeedSequence(
        int.from_bytes(json.dumps(settings, sort_keys=True).encode(), "little")
    ).generate_state(1, np.uint64)[0]
    teachers = "-".join(map(str, config.teachers))
    rhos = "-".join(f"{rho:g}" for rho in config.rhos)
    return f"teacher{teachers}_rho{rhos}_{int(digest):016x}"
