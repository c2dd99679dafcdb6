"""What training a grid of students gives, and the exponent of depth read off it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from depthutil import _checks, _runs, archive, powerlaw
from depthutil.toy.grid import Trainer, by_student, read_checkpoint
from depthutil.toy.model import GRID, Network, ToyConfig

#: Where :func:`exponent` draws the line between a power law and another decline.
POWER_LAW = {
    "residual": powerlaw.THRESHOLDS["scatter"],
    "drift": powerlaw.THRESHOLDS["drift"],
}


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
        What computed it, as :func:`depthutil.toy.kernels.choose` says; empty if not known.
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
        >>> from depthutil.toy import train
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
            raise ValueError(f"there was no test at step {step}, but at {some(self.losses.step)}")
        if self.config.decay and step != self.config.steps:
            raise ValueError("a run whose learning rate decays has no shorter run inside it")
        table = self.losses[self.losses["step"] <= step].reset_index(drop=True)
        seconds = self.wall_seconds * step / self.losses["step"].max()
        return ToyResult(replace(self.config, steps=step), table, seconds, kernel=self.kernel)

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike, students: bool = False) -> ToyResult:
        """What a checkpoint of :func:`train` holds, of a run that may still go on."""
        _, settings = read_checkpoint(path)
        trainer = Trainer(ToyConfig(**settings), torch.device("cpu"))
        trainer.load(Path(path))
        table = pd.DataFrame(trainer.records, columns=[*GRID, "step", "loss"])
        weights = by_student(trainer) if students else {}
        return cls(trainer.config, table, trainer.seconds, weights, trainer.kernel)

    def save(
        self, path: str | os.PathLike, scale: str | None = None, device: str | None = None
    ) -> Path:
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
    grid: dict[str, Any] = {
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
        raise ValueError(f"there was no test at step {absent[0]}: {some(frame['step'])} have one")
    depths = sorted(set(frame["depth"]) if depths is None else set(depths))
    if len(depths) < 3:
        raise ValueError(f"an exponent and its fit need at least three depths, not {depths}")
    if not set(depths) <= set(frame["depth"]):
        raise ValueError(f"depths {depths} were not all trained: {some(frame['depth'])} were")
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


def some(values: pd.Series) -> str:
    """The values in words, shortened where they are many."""
    known = sorted(set(values))
    return ", ".join(map(str, known if len(known) < 8 else [*known[:3], "…", *known[-3:]]))
