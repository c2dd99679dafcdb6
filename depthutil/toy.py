"""Train a whole grid of toy students at once, and read the exponent of depth off it.

:func:`train` trains every student of a ``ToyConfig``: teachers × rhos × temperatures ×
depths × seeds. One batch of inputs and one pass through the teacher serve every student of
that teacher, and students of one depth are stacked and stepped as one batched computation.
The model, and the plain loop that this must equal, are in ``depthutil.toy_model``.
:func:`exponent` fits the power of depth, :func:`sweep` spreads grids over machines.
"""

from __future__ import annotations

import itertools
import json
import math
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
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from inspect import signature
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from depthutil import _checks, _grid, _runs, archive, kernels, powerlaw
from depthutil.toy_model import GRID, Network, ToyConfig, train_plainly

__all__ = [
    "GRID",
    "POWER_LAW",
    "Network",
    "SweepError",
    "ToyConfig",
    "ToyResult",
    "exponent",
    "gpu_pool",
    "merge",
    "shards",
    "slug",
    "sweep",
    "train",
    "train_plainly",
]

#: Where :func:`exponent` draws the line between a power law and another decline.
POWER_LAW = {
    "residual": powerlaw.THRESHOLDS["scatter"],
    "drift": powerlaw.THRESHOLDS["drift"],
}


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
        What computes the networks, see :func:`depthutil.kernels.choose`: ``"auto"``,
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
    with _runs.cpu(threads), _grid.stream(device):
        trainer = _grid.Trainer(config, device, stack, graph)
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
        weights = _grid.by_student(trainer) if students else {}
    return ToyResult(
        config=config,
        losses=pd.DataFrame(trainer.records, columns=[*GRID, "step", "loss"]),
        wall_seconds=trainer.seconds,
        weights=weights,
        kernel=trainer.kernel,
    )


# Results --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToyResult:
    """Test losses of a grid of students and, on request, the students.

    Attributes
    ----------
    config : ToyConfig
    losses : pandas.DataFrame
        ``teacher, rho, temperature, depth, seed, step, loss``, one test of one student a
        row; the loss in nats for ``"kl"``.
    wall_seconds : float
        Time it took, over all its processes and interruptions.
    weights : dict
        For each trained student, by its values of ``GRID``: ``w1, b, w2, head``.
    kernel : str
        What computed it, as :func:`depthutil.kernels.choose` says; empty if not known.
    """

    config: ToyConfig
    losses: pd.DataFrame
    wall_seconds: float
    weights: dict[tuple, tuple] = field(default_factory=dict, repr=False)
    kernel: str = ""

    def student(self, **which: Any) -> Network:
        """One trained student; name as many of teacher, rho, … as single it out."""
        found = [key for key in self.weights if _matches(key, which)]
        if len(found) != 1:
            held = "train with students=True" if not self.weights else "say more of " + str(GRID)
            raise ValueError(f"{which} names {len(found)} of the trained students: {held}")
        w1, b, w2, head = self.weights[found[0]]
        return Network(w1, b, w2, head, self.config.order)

    def states(self, inputs: int | Tensor = 256, **which: Any) -> Tensor:
        """Residual stream of a trained student, ``(depth + 1, inputs, width)``.

        Parameters
        ----------
        inputs : int or torch.Tensor
            Inputs ``(inputs, width)``, or how many random ones to draw, always the same.
        **which
            As for :meth:`student`.

        Examples
        --------
        >>> config = ToyConfig(width=4, vocabulary=8, teacher_depth=8, depths=(1, 2),
        ...                    rhos=(0.0,), teachers=(0,), batch=16, steps=2)
        >>> train(config, students=True).states(inputs=10, depth=2).shape
        torch.Size([3, 10, 4])
        """
        student = self.student(**which)
        if isinstance(inputs, int):
            dtype = getattr(torch, self.config.dtype)
            shape = (inputs, self.config.width)
            inputs = torch.randn(shape, generator=_runs.generator("states")).to(dtype)
        with torch.no_grad():
            return torch.stack(student.states(inputs))

    def until(self, step: int) -> ToyResult:
        """What the run had shown by this step; without students, who were trained on."""
        if step not in set(self.losses["step"]):
            raise ValueError(f"there was no test at step {step}, but at {_some(self.losses.step)}")
        if self.config.decay and step != self.config.steps:
            raise ValueError("a run whose learning rate decays has no shorter run inside it")
        table = self.losses[self.losses["step"] <= step].reset_index(drop=True)
        seconds = self.wall_seconds * step / self.losses["step"].max()
        return ToyResult(replace(self.config, steps=step), table, seconds, kernel=self.kernel)

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike, students: bool = False) -> ToyResult:
        """What a checkpoint of :func:`train` holds, of a run that may still go on."""
        _, settings = _grid.read_checkpoint(path)
        trainer = _grid.Trainer(ToyConfig(**settings), torch.device("cpu"))
        trainer.load(Path(path))
        table = pd.DataFrame(trainer.records, columns=[*GRID, "step", "loss"])
        weights = _grid.by_student(trainer) if students else {}
        return cls(trainer.config, table, trainer.seconds, weights, trainer.kernel)

    def save(self, path: str | os.PathLike, scale: str | None = None, device=None) -> Path:
        """Write the losses to the archive, see :func:`depthutil.archive.save`."""
        return archive.save(
            self.losses,
            path,
            config=asdict(self.config),
            seeds={"teachers": list(self.config.teachers), "students": list(self.config.seeds)},
            scale=scale or self.config.scale,
            wall_seconds=self.wall_seconds,
            device=device,
            method=self.kernel,
        )

    @classmethod
    def load(cls, path: str | os.PathLike) -> ToyResult:
        """Read what :meth:`save` wrote."""
        archived = archive.load(path)
        known = {f.name for f in fields(ToyConfig)}
        missing = {*GRID, "step", "loss"} - set(archived.frame.columns)
        if missing or not set(archived.provenance["config"]) <= known:
            raise ValueError(f"{path} holds no losses of toy networks")
        config = ToyConfig(**archived.provenance["config"])
        about = archived.provenance
        return cls(config, archived.frame, about["wall_seconds"], kernel=about.get("method", ""))


def _matches(key: tuple, which: dict[str, Any]) -> bool:
    unknown = set(which) - set(GRID)
    if unknown:
        raise ValueError(f"a student is named by {GRID}, not by {sorted(unknown)}")
    values = dict(zip(GRID, key, strict=True))
    return all(math.isclose(values[name], value) for name, value in which.items())


def exponent(
    result: ToyResult | pd.DataFrame,
    at: int | Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
) -> pd.DataFrame:
    """The power of depth with which the test loss falls, for each rho and temperature.

    For each teacher and seed, ``alpha`` is minus the least-squares slope of log loss on
    log depth (arXiv 2602.05970, figure 3); then the mean over them and its standard error.

    Parameters
    ----------
    result : ToyResult or pandas.DataFrame
        A result, or its ``losses``.
    at : int or sequence of int, optional
        Steps, as tested; the last by default.
    depths : sequence of int, optional
        Depths to fit, at least three; all by default.

    Returns
    -------
    pandas.DataFrame
        One row for each ``rho``, ``temperature`` and ``step``: ``alpha``; ``stderr`` over
        ``teachers``, or the line's own with a single teacher; ``residual``, root mean square
        of log loss about the line; ``drift``, by how much the local exponent of a
        quadratic fit changes from the shallowest depth to the deepest; ``power_law``, whether
        the fit deserves the name: residual below 0.1, and drift below a third of ``alpha``
        (or within twice its standard error over teachers), as
        :attr:`depthutil.powerlaw.PowerLaw.is_power_law` says.

    Examples
    --------
    >>> frame = pd.DataFrame([(t, 0.0, 1.0, depth, 0, 100, (1 + t) / depth)
    ...                       for t in (0, 1) for depth in (4, 8, 16)],
    ...                      columns=[*GRID, "step", "loss"])
    >>> exponent(frame).round(3)[["alpha", "teachers", "power_law"]].iloc[0].to_dict()
    {'alpha': 1.0, 'teachers': 2, 'power_law': True}
    """
    frame = result.losses if isinstance(result, ToyResult) else result
    steps = [frame["step"].max()] if at is None else np.atleast_1d(at).tolist()
    absent = sorted(set(steps) - set(frame["step"]))
    if absent:
        raise ValueError(f"there was no test at step {absent[0]}: {_some(frame['step'])} have one")
    depths = sorted(set(frame["depth"]) if depths is None else set(depths))
    if len(depths) < 3:
        raise ValueError(f"an exponent and its fit need at least three depths, not {depths}")
    if not set(depths) <= set(frame["depth"]):
        raise ValueError(f"depths {depths} were not all trained: {_some(frame['depth'])} were")
    frame = frame[frame["step"].isin(steps) & frame["depth"].isin(depths)]
    rows = []
    for (rho, temperature, step), part in frame.groupby(["rho", "temperature", "step"]):
        try:
            table = _checks.wide(part, ["teacher", "seed"], "depth", "loss")
        except ValueError as error:
            raise ValueError(f"rho {rho:g}, temperature {temperature:g}: {error}") from error
        rows.append({"rho": rho, "temperature": temperature, "step": step, **_power_law(table)})
    return pd.DataFrame(rows)


def _power_law(table: pd.DataFrame) -> dict[str, Any]:
    """Fit log loss; a student's seed is a row of the table, and a depth a column."""
    # Seeds of one teacher are no independent teachers: average them first.
    each = np.exp(np.log(table).groupby("teacher").mean())
    law = powerlaw.fit(each.columns, each.T)
    return {
        "alpha": law.exponent,
        "stderr": law.stderr,
        "teachers": len(each),
        "residual": law.scatter,
        "drift": law.drift,
        "power_law": law.is_power_law,
    }


def _some(values: pd.Series) -> str:
    known = sorted(set(values))
    return ", ".join(map(str, known if len(known) < 8 else [*known[:3], "…", *known[-3:]]))


# Many grids -----------------------------------------------------------------------------


def shards(config: ToyConfig) -> list[ToyConfig]:
    """The grid as independent grids of one teacher and one rho each, teacher by teacher.

    Examples
    --------
    >>> [(s.teachers, s.rhos) for s in shards(ToyConfig(teachers=(0, 1), rhos=(1.0, 0.0)))]
    [((0,), (1.0,)), ((0,), (0.0,)), ((1,), (1.0,)), ((1,), (0.0,))]
    """
    pairs = itertools.product(config.teachers, config.rhos)
    return [replace(config, teachers=(teacher,), rhos=(rho,)) for teacher, rho in pairs]


def merge(results: Sequence[ToyResult]) -> ToyResult:
    """Put the results of :func:`shards` together again.

    Raises
    ------
    ValueError
        If there is none, or if they differ in more than the grid.
    """
    if not results:
        raise ValueError("there are no results to merge")
    axes = ("teachers", "rhos", "temperatures", "depths", "seeds")
    first = results[0].config
    for result in results:
        if replace(result.config, **{name: getattr(first, name) for name in axes}) != first:
            raise ValueError("results of runs whose settings differ in more than the grid")
    grid = {
        name: tuple(sorted(set().union(*(getattr(r.config, name) for r in results))))
        for name in axes
    }
    order = ["step", *GRID]
    table = pd.concat([result.losses for result in results]).sort_values(order, ignore_index=True)
    if table.duplicated(order).any():
        raise ValueError("two of the results hold the same student: merge each result once")
    weights = {key: value for result in results for key, value in result.weights.items()}
    seconds = sum(result.wall_seconds for result in results)
    computed = "; ".join(sorted({result.kernel for result in results if result.kernel}))
    return ToyResult(replace(first, **grid), table, seconds, weights, computed)


class SweepError(RuntimeError):
    """Some grids of a :func:`sweep` were not trained to their end; the others are here.

    Attributes
    ----------
    results : list
        In the order of the grids, each one's ``ToyResult``, or None.
    errors : dict
        What stopped a grid, by its place among them.
    """

    def __init__(self, message: str, results: Sequence[ToyResult | None] = (), errors=None):
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
    return results


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
    what = "; ".join(f"{_some(grids)} ({text})" for text, grids in said.items())
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
