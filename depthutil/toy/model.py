"""The toy model, as plainly as it can be written: a deep random teacher, a shallower student.

A residual network without attention (Liu et al., arXiv 2602.05970, section 4 and appendix
C) learns to imitate a deeper, random one. Two knobs decide how a student uses its depth:
``rho``, how alike the teacher's layers are, and the temperature of the teacher's output.

:class:`ToyConfig` holds every setting, :class:`Network` is the model, :func:`train_plainly`
trains one student. ``depthutil.toy.train`` computes the same for a whole grid of students.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthutil import _checks, _runs

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

#: What names a student; with ``step`` and ``loss``, the columns of ``ToyResult.losses``.
GRID = ("teacher", "rho", "temperature", "depth", "seed")

EPS = torch.finfo(torch.float32).eps

_EXPERIMENTS: dict[str, dict[str, Any]] = {
    "fig3b": {"steps": 40_000, "temperatures": tuple(np.logspace(-2, 0, 16).tolist())},
    "fig4": {
        "steps": 80_000,
        "temperatures": tuple(np.logspace(-2, 0, 16).tolist()),
        "rhos": (1.0,),
        "head": "given",
        "temperature_on": "both",
        "depth_factor": 4.0,
        "decay": True,
    },
    "fig5": {"steps": 80_000, "loss": "mse", "head": "none", "depth_factor": 2.0, "decay": True},
}
_EXPERIMENTS["second_order"] = _EXPERIMENTS["fig5"] | {
    "order": 2,
    "depths": (3, 6, 8, 12, 16, 24),
}
_EXPERIMENTS["shallow_teacher"] = _EXPERIMENTS["fig5"] | {"steps": 40_000, "teacher_depth": 24}

# What a smaller machine changes. A laptop's students learn faster than the paper's, and slow
# down at the end, to get somewhere in a minute: see ToyConfig.paper.
_SCALES: dict[str, dict[str, Any]] = {
    "demo": {
        "width": 16,
        "vocabulary": 64,
        "teacher_depth": 64,
        "depths": (2, 3, 4, 6, 8, 12),
        "teachers": (0, 1),
        "temperatures": (0.1, 0.3, 1.0),
        "batch": 128,
        "steps": 2_000,
        "decay": True,
        "test_every": 200,
    },
    "colab": {
        "teachers": (0, 1),
        "temperatures": tuple(np.logspace(-2, 0, 6).tolist()),
        "batch": 256,
        "steps": 10_000,
        "test_every": 250,
    },
    "paper": {},
}


@dataclass(frozen=True)
class ToyConfig:
    """Every setting of a grid of students. :meth:`paper` has the published ones.

    Parameters
    ----------
    width : int
        Size ``d`` of the residual stream.
    expansion : int
        A layer's hidden size, in widths.
    vocabulary : int
        Outputs of the head.
    teacher_depth : int
        Layers of the teacher.
    depths : sequence of int
        Layers of the students.
    order : int
        1: a layer adds what one MLP says. 2: a layer is a midpoint step of two MLPs,
        ``x + g₂(x + g₁(x)/2)``, and costs twice as much.
    rhos : sequence of float
        Share of each teacher layer's variance that all its layers have in common:
        0 for independent layers, 1 for one layer repeated.
    teachers, seeds : sequence of int
        Seeds of the teachers, and of the students of each teacher.
    temperatures : sequence of float
        The teacher's logits are divided by these.
    loss : str
        ``"kl"``, KL(teacher‖student), or ``"mse"``, mean squared difference of the normed
        last states.
    head : str
        The student's: ``"own"``, learned from zero; ``"given"``, the teacher's, fixed;
        ``"none"`` with ``"mse"``.
    temperature_on : str
        ``"teacher"``, or ``"both"`` to divide the student's logits too.
    steps, batch : int
        Adam steps; fresh inputs a step.
    learning_rate : float
        Adam's.
    depth_factor : float, optional
        Multiply the learning rate by ``depth_factor / √depth``.
    decay : bool
        Over the last 20 % of steps, let the learning rate fall linearly to a tenth.
    test_every, test_batches : int
        Steps between tests; fresh batches a test.
    dtype : str
        ``"float32"`` or ``"float64"``.
    scale : str
        What to call the size of this run in captions.

    Raises
    ------
    ValueError
        If a setting makes no sense, in one sentence.

    Examples
    --------
    >>> config = ToyConfig(depths=(6, 12), temperatures=(1.0,), steps=100)
    >>> config.hidden, config.rate(depth=6, step=0)
    (128, 0.0006)
    """

    width: int = 32
    expansion: int = 4
    vocabulary: int = 128
    teacher_depth: int = 128
    depths: tuple[int, ...] = (6, 12, 16, 24, 32, 48)
    order: int = 1
    rhos: tuple[float, ...] = (0.0, 1.0)
    teachers: tuple[int, ...] = (0, 1, 2)
    seeds: tuple[int, ...] = (0,)
    temperatures: tuple[float, ...] = (1.0,)
    loss: str = "kl"
    head: str = "own"
    temperature_on: str = "teacher"
    steps: int = 40_000
    batch: int = 1024
    learning_rate: float = 6e-4
    depth_factor: float | None = None
    decay: bool = False
    test_every: int = 500
    test_batches: int = 10
    dtype: str = "float32"
    scale: str = "custom"

    def __post_init__(self) -> None:
        _checks.sequences(self, ("depths", "teachers", "seeds"), int)
        _checks.sequences(self, ("rhos", "temperatures"), float)
        sizes = ("width", "expansion", "vocabulary", "teacher_depth", "steps", "batch")
        _checks.counts(self, (*sizes, "test_every", "test_batches"))
        for name in ("learning_rate", "depth_factor"):
            value = getattr(self, name)
            if name == "depth_factor" and value is None:
                continue
            _checks.number(value, name, low=0, above=True)
        object.__setattr__(self, "decay", _checks.flag(self.decay, "decay"))
        for name, choices in {
            "loss": ("kl", "mse"),
            "head": ("own", "given", "none"),
            "temperature_on": ("teacher", "both"),
            "dtype": ("float32", "float64"),
            "order": (1, 2),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is one of {choices}, not {getattr(self, name)!r}")
        if min(self.depths) < 1:
            raise ValueError(f"depths are at least 1, not {min(self.depths)}")
        if min(*self.teachers, *self.seeds, 0) < 0:
            raise ValueError("seeds of teachers and students are not negative")
        if not all(0 <= rho <= 1 for rho in self.rhos):
            raise ValueError(f"rhos lie between 0 and 1, not {self.rhos}")
        if not all(0 < t < math.inf for t in self.temperatures):
            raise ValueError(f"temperatures are positive and finite, not {self.temperatures}")
        if (self.loss == "mse") != (self.head == "none"):
            raise ValueError(
                f"loss {self.loss!r} does not go with head {self.head!r}: "
                "'mse' compares states and takes head='none', 'kl' needs a head"
            )
        if self.loss == "mse" and self.temperatures != (1.0,):
            raise ValueError("loss 'mse' knows no temperature: leave temperatures at (1.0,)")

    @classmethod
    def paper(cls, experiment: str, scale: str = "paper", **changes: Any) -> ToyConfig:
        """The settings of an experiment of the paper, as published or scaled down.

        Parameters
        ----------
        experiment : str
            ``"fig3b"``, ``"fig4"``, ``"fig5"``, ``"second_order"`` (appendix C.3) or
            ``"shallow_teacher"`` (appendix C).
        scale : str
            ``"demo"``, about a minute of a laptop: a smaller teacher, fewer and faster
            steps. ``"colab"``, a small GPU or hours of a laptop: the paper's networks, fewer
            and smaller steps, two teachers. ``"paper"``: as published.
        **changes
            Settings to change; ``config.scale`` then names them.

        Examples
        --------
        >>> ToyConfig.paper("fig4").steps
        80000
        >>> ToyConfig.paper("fig3b", "colab", teachers=(0,)).scale
        'colab, with other teachers'
        """
        for kind, name, known in (
            ("experiment", experiment, _EXPERIMENTS),
            ("scale", scale, _SCALES),
        ):
            if name not in known:
                raise ValueError(f"there is no {kind} {name!r}: choose from {', '.join(known)}")
        settings = _EXPERIMENTS[experiment] | _SCALES[scale]
        if scale == "demo":
            paced = "depth_factor" in settings
            settings |= {"depth_factor": 4.0} if paced else {"learning_rate": 3e-3}
        if settings.get("loss") == "mse":
            settings["temperatures"] = (1.0,)
        if experiment == "shallow_teacher":
            settings["teacher_depth"] = 24 if scale != "demo" else 4
        label = scale + (f", with other {', '.join(changes)}" if changes else "")
        return cls(**{**settings, "scale": label, **changes})

    @property
    def hidden(self) -> int:
        """Hidden size of a layer."""
        return self.expansion * self.width

    def rate(self, depth: int, step: int) -> float:
        """Learning rate of the update that follows ``step`` updates."""
        rate = self.learning_rate
        if self.depth_factor is not None:
            rate *= self.depth_factor / math.sqrt(depth)
        late = max(step / self.steps - 0.8, 0) / 0.2 if self.decay else 0
        return rate * (1 - 0.9 * late)

    def students(self, depth: int) -> list[dict[str, Any]]:
        """The students of one depth, in the order in which they are stacked."""
        grid = itertools.product(self.teachers, self.rhos, self.temperatures, self.seeds)
        return [dict(zip(GRID, (t, r, temp, depth, s), strict=True)) for t, r, temp, s in grid]


# The model ------------------------------------------------------------------------------


def rms(x: Tensor) -> Tensor:
    """Divide by the root mean square over the last axis; no gain."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


class Layer(nn.Module):
    """One MLP, ``W₂ relu(W₁ rms(x) + b)²``: what it reads off the stream it answers to it."""

    def __init__(self, w1: Tensor, b: Tensor, w2: Tensor):
        super().__init__()
        self.w1, self.b, self.w2 = nn.Parameter(w1), nn.Parameter(b), nn.Parameter(w2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(rms(x), self.w1, self.b)).square(), self.w2)


class Network(nn.Module):
    """Teacher or student, as plainly as it can be written: the reference for ``toy.train``.

    Parameters
    ----------
    w1, b, w2 : torch.Tensor
        Weights of all MLPs, ``(depth · order, hidden, width)``,
        ``(depth · order, hidden)`` and ``(depth · order, width, hidden)``.
    head : torch.Tensor, optional
        ``(vocabulary, width)``.
    order : int
        1, or 2 for midpoint steps.
    """

    def __init__(
        self,
        w1: Tensor,
        b: Tensor,
        w2: Tensor,
        head: Tensor | None = None,
        order: int = 1,
    ):
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, w1.clone(), b.clone(), w2.clone()))
        self.head = None if head is None else nn.Parameter(head.clone())
        self.order = order

    def states(self, x: Tensor) -> list[Tensor]:
        """The residual stream before the first layer and after each."""
        stream = [rms(x)]
        for layers in zip(*[iter(self.layers)] * self.order, strict=True):
            x = stream[-1]
            if self.order == 1:
                stream.append(x + layers[0](x))
            else:
                stream.append(x + layers[1](x + layers[0](x) / 2))
        return stream

    def forward(self, x: Tensor) -> Tensor:
        """The last state; the norm after it belongs to the loss."""
        return self.states(x)[-1]


def _uniform(
    shape: Sequence[int], fan_in: int, generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """What ``nn.Linear`` starts from."""
    bound = fan_in**-0.5
    return ((torch.rand(shape, generator=generator) * 2 - 1) * bound).to(dtype)


def _mlps(config: ToyConfig, count: int, generator: torch.Generator) -> list[Tensor]:
    d, h, dtype = config.width, config.hidden, getattr(torch, config.dtype)
    return [
        _uniform((count, h, d), d, generator, dtype),
        _uniform((count, h), d, generator, dtype),
        _uniform((count, d, h), h, generator, dtype),
    ]


def teacher_weights(config: ToyConfig, teacher: int, rho: float) -> tuple[Tensor, ...]:
    """A teacher's ``w1, b, w2, head``; the layers of one seed are paired over ``rho``.

    Every layer is ``√ρ W₀ + √(1−ρ) W_l``, so its variance does not depend on ``rho``.
    """
    depth = config.teacher_depth
    generator = _runs.generator("teacher", teacher)
    common = _mlps(config, 1, generator)
    each = _mlps(config, depth, generator)
    w1, b, w2 = (
        math.sqrt(rho) * one + math.sqrt(1 - rho) * own
        for one, own in zip(common, each, strict=True)
    )
    shape, dtype = (config.vocabulary, config.width), w1.dtype
    if config.head == "given":
        head = (torch.randn(shape, generator=generator) / math.sqrt(config.width)).to(dtype)
    else:
        head = _uniform(shape, config.width, generator, dtype)
    return w1, b, w2 / math.sqrt(depth), head


def student_weights(config: ToyConfig, teacher: int, depth: int, seed: int) -> tuple[Tensor, ...]:
    """A student's first ``w1, b, w2, head``: the same at every temperature and ``rho``."""
    generator = _runs.generator("student", teacher, depth, seed)
    w1, b, w2 = _mlps(config, depth * config.order, generator)
    return w1, b, torch.zeros_like(w2), w1.new_zeros(config.vocabulary, config.width)


def inputs(config: ToyConfig, teacher: int, step: int, test: bool = False) -> Tensor:
    """Fresh ``N(0, 1)`` inputs of a step or a test, ``(batch, width)``, from its number alone."""
    generator = _runs.generator("test" if test else "train", teacher, step)
    batch = config.batch * (config.test_batches if test else 1)
    return torch.randn(batch, config.width, generator=generator).to(getattr(torch, config.dtype))


def targets(config: ToyConfig, last: Tensor, head: Any, temperature: Any) -> tuple[Tensor, ...]:
    """What students learn: the teacher's probabilities and their logs, or its normed state."""
    if config.loss == "mse":
        return (rms(last),)
    logs = (rms(last) @ head.mT / temperature).log_softmax(-1)
    return logs.exp(), logs


def losses(
    config: ToyConfig, last: Tensor, head: Any, temperature: Any, target: Sequence[Tensor]
) -> Tensor:
    """A student's loss given its last state ``(…, batch, width)``; one number a student."""
    if config.loss == "mse":
        return (rms(last) - target[0]).square().mean((-1, -2))
    logits = rms(last) @ head.mT
    if config.temperature_on == "both":
        logits = logits / temperature
    probabilities, logs = target
    return (probabilities * (logs - logits.log_softmax(-1))).sum(-1).mean(-1)


def train_plainly(
    config: ToyConfig,
    *,
    teacher: int,
    rho: float,
    temperature: float,
    depth: int,
    seed: int = 0,
    watch: Callable[[int, float], None] | None = None,
) -> Network:
    """Train one student the way one would write it down: what ``toy.train`` must equal.

    Parameters
    ----------
    config : ToyConfig
    teacher, rho, temperature, depth, seed
        Which student; any values, whether ``config`` lists them or not.
    watch : callable, optional
        Called with the step and the training loss.

    Examples
    --------
    >>> config = ToyConfig(width=4, vocabulary=8, teacher_depth=4, batch=16, steps=3)
    >>> student = train_plainly(config, teacher=0, rho=0.0, temperature=1.0, depth=2)
    >>> len(student.layers)
    2
    """
    w1, b, w2, teacher_head = teacher_weights(config, teacher, rho)
    deep = Network(w1, b, w2)
    w1, b, w2, head = student_weights(config, teacher, depth, seed)
    student = Network(w1, b, w2, head if config.head == "own" else None, config.order)
    adam = torch.optim.Adam(student.parameters())
    for step in range(config.steps):
        x = inputs(config, teacher, step)
        with torch.no_grad():
            target = targets(config, deep(x), teacher_head, temperature)
        head = teacher_head if student.head is None else student.head
        loss = losses(config, student(x), head, temperature, target)
        adam.zero_grad()
        loss.backward()
        adam.param_groups[0]["lr"] = config.rate(depth, step)
        adam.step()
        if watch:
            watch(step, loss.item())
    return student
