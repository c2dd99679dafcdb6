"""The grid of students that ``depthutil.toy`` trains: its groups, its steps, its checkpoints.

How a stack of networks is computed is known to ``toy.kernels`` alone.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from depthutil import _checks, archive
from depthutil.toy.kernels import Memory, Stack
from depthutil.toy.model import (
    GRID,
    ToyConfig,
    inputs,
    losses,
    student_weights,
    targets,
    teacher_weights,
)

# On a CPU, as many students are stacked as keep one layer's activations in a core's cache.
CACHE_BYTES = 2**20
# To look at a GPU's results is to wait for it: steps between looks for a loss that is no number.
WATCH = 100
# A GPU's inputs are drawn while it is still busy with as many earlier steps.
PREFETCH = 4


class Group:
    """Students of one depth that are stepped together, with their heads and their Adam."""

    def __init__(
        self,
        config: ToyConfig,
        depth: int,
        rows: slice,
        given: Tensor,
        memory: Memory,
        device: torch.device,
        stack: Callable[..., Stack] = Stack,
        graph: bool = False,
    ):
        self.config, self.depth, self.rows, self.memory = config, depth, rows, memory
        self.students = config.students(depth)[rows]
        started: dict[tuple, tuple] = {}
        for s in self.students:
            key = (s["teacher"], s["seed"])
            if key not in started:
                started[key] = student_weights(config, s["teacher"], depth, s["seed"])
        parts = zip(*(started[s["teacher"], s["seed"]] for s in self.students), strict=True)
        w1, b, w2, heads = parts
        self.weights = [torch.stack(part, 1).to(device) for part in (w1, b, w2)]
        self.stack = stack(*self.weights, config.order, memory)
        self.head = torch.stack(heads).to(device) if config.head == "own" else given[rows]
        self.trained = [*self.weights, *([self.head] if config.head == "own" else [])]
        # One pass over the weights instead of a dozen; PyTorch 2.2 has it on GPUs only.
        fused = device.type == "cuda" or torch.__version__ >= "2.4"
        options: dict[str, Any] = {"fused": True} if fused else {"foreach": True}
        if graph:  # which repeats its kernels with their arguments: the rate is read from memory
            options |= {"capturable": True, "lr": torch.tensor(1e-3, device=device)}
        self.adam = torch.optim.Adam(self.trained, **options)
        self.rate: float | None = None
        self.temperature = torch.tensor(
            [[[s["temperature"]]] for s in self.students], dtype=w1[0].dtype, device=device
        )
        self.broken = torch.zeros(len(self.students), dtype=torch.bool, device=device)

    def start_as(self, start: str, teacher: ToyConfig) -> None:
        """Begin with layers that are all alike, or with the teacher's at even distances."""
        w1, b, w2 = self.weights
        for i, s in enumerate(self.students):
            if start == "tied":
                w1[:, i], b[:, i] = w1[0, i].clone(), b[0, i].clone()
                continue
            own = teacher_weights(teacher, s["teacher"], s["rho"])
            layers = np.arange(self.depth) * teacher.teacher_depth // self.depth
            w1[:, i], b[:, i] = own[0][layers], own[1][layers]
            # Euler's method on the teacher's own flow: fewer steps, each as much longer.
            w2[:, i] = own[2][layers] * teacher.teacher_depth / self.depth

    def set_rate(self, step: int) -> None:
        """Set the learning rate of a step."""
        rate, options = self.config.rate(self.depth, step), self.adam.param_groups[0]
        if rate != self.rate and isinstance(options["lr"], Tensor):
            options["lr"].fill_(rate)
        elif rate != self.rate:
            options["lr"] = rate
        self.rate = rate

    def step(self, x: Tensor, target: tuple[Tensor, ...]) -> None:
        """One Adam step of every student."""
        last = self.stack.forward(x[self.rows], keep=True).requires_grad_()
        own = self.config.head == "own"
        head = self.head.detach().requires_grad_() if own else self.head
        target = tuple(part[self.rows] for part in target)
        loss = losses(self.config, last, head, self.temperature, target)
        # Each student's loss is its own: the gradient of their sum is every student's.
        grads = torch.autograd.grad(loss.sum(), [last, head] if own else [last])
        into = [self.memory.take(f"grad{i}", w.shape, w) for i, w in enumerate(self.weights)]
        for weight, grad in zip(self.weights, into, strict=True):
            weight.grad = grad
        if own:
            # The fused Adam reads memory in order, whatever the strides say.
            self.head.grad = grads[1].contiguous()
        self.stack.backward(grads[0], into)
        self.adam.step()
        for weight in self.trained:
            weight.grad = None
        self.broken |= ~torch.isfinite(loss.detach())

    @torch.no_grad()
    def test(self, x: Tensor, target: tuple[Tensor, ...]) -> Tensor:
        """Losses on these inputs, in float64: small ones are differences of large numbers."""
        last = self.stack.forward(x[self.rows]).double()
        head = None if self.config.head == "none" else self.head.double()
        target = tuple(part[self.rows] for part in target)
        return losses(self.config, last, head, self.temperature.double(), target)

    def load(self, weights: list[list[Tensor]], adams: list[dict[str, Any]]) -> None:
        """Continue from a checkpoint's groups of this depth, on whatever device they were."""

        def ours(parts: Iterable[Tensor], i: int) -> Tensor:
            parts, axis = list(parts), 0 if i == len(self.weights) else 1  # the head has no layers
            if not parts[0].dim():  # Adam's count of steps, which each group advances
                return parts[0].clone()
            rows = self.rows.stop - self.rows.start
            return torch.cat(parts, axis).narrow(axis, self.rows.start, rows).contiguous()

        for i, weight in enumerate(self.trained):
            weight.copy_(ours((group[i] for group in weights), i))
        # What Adam has accumulated is the run's; how it computes is this machine's.
        state = {
            i: {name: ours((adam["state"][i][name] for adam in adams), i) for name in known}
            for i, known in adams[0]["state"].items()
        }
        self.adam.load_state_dict(self.adam.state_dict() | {"state": state})


class InputBuffer:
    """Inputs of one step after another, the same numbers on every device.

    They are drawn on the CPU. For a GPU that happens while it computes earlier steps; a
    piece of pinned memory is written again only after its copy to the GPU has ended.
    """

    def __init__(self, config: ToyConfig, device: torch.device):
        self.config, self.device = config, device
        shape = (len(config.teachers), config.batch, config.width)
        if device.type == "cuda":
            dtype = getattr(torch, config.dtype)
            self.pinned = torch.empty((PREFETCH, *shape), dtype=dtype, pin_memory=True)
            self.copied = [torch.cuda.Event() for _ in range(PREFETCH)]
            self.fed = torch.empty(shape, dtype=dtype, device=device)

    def draw(self, step: int, test: bool = False) -> Tensor:
        """``(teachers, inputs, width)``, on the CPU."""
        return torch.stack([inputs(self.config, t, step, test) for t in self.config.teachers])

    def __call__(self, step: int) -> Tensor:
        """The inputs of a training step; on a GPU always in the same place."""
        if self.device.type != "cuda":
            return self.draw(step).to(self.device)
        slot = step % PREFETCH
        self.copied[slot].synchronize()
        self.pinned[slot].copy_(self.draw(step))
        self.fed.copy_(self.pinned[slot], non_blocking=True)
        self.copied[slot].record()
        return self.fed


class Trainer:
    """The grid: teachers, groups of students, and everything a checkpoint has to hold.

    On a GPU, ``graph`` records the second step once, kernel by kernel, and every later step
    is a replay of the record: nothing on the way may wait for the GPU or move in memory.
    ``graph=None`` does without a record where the GPU refuses to make it.

    Teachers have the sizes of ``taught_by``, of the grid's own configuration by default.
    Students ``start`` ``"fresh"``, ``"tied"`` (all layers read alike), or as a ``"teacher"``
    with fewer, longer steps.
    """

    def __init__(
        self,
        config: ToyConfig,
        device: torch.device,
        stack: Callable[..., Stack] = Stack,
        graph: bool | None = False,
        *,
        taught_by: ToyConfig | None = None,
        start: str = "fresh",
    ):
        _checks.word(start, ("fresh", "tied", "teacher"), "start")
        self.config, self.device, self.memory = config, device, Memory()
        self.step, self.seconds, self.kernel = 0, 0.0, ""
        self.records: list[list[Any]] = []
        self.must, self.graph = graph is True, device.type == "cuda" and graph is not False
        self.watch = 1 if device.type == "cpu" else WATCH
        self.advanced, self.watched = 0, 0
        self.replay: Callable[[], None] | None = None
        self.inputs = InputBuffer(config, device)
        pairs = list(itertools.product(config.teachers, config.rhos))
        taught_by = config if taught_by is None else taught_by
        parts = [teacher_weights(taught_by, teacher, rho) for teacher, rho in pairs]
        *mlps, heads = zip(*parts, strict=True)
        w1, b, w2 = (torch.stack(part, 1).to(device) for part in mlps)
        self.teachers = stack(w1, b, w2, memory=self.memory)
        self.heads = torch.stack(heads).to(device)
        self.temperatures = torch.tensor(config.temperatures, dtype=w1.dtype, device=device)
        count = len(config.students(0))
        given = self.heads.repeat_interleave(count // len(pairs), 0)
        fits = CACHE_BYTES // (config.batch * config.hidden * w1.element_size())
        most = max(1, fits) if device.type == "cpu" else count
        ends = np.linspace(0, count, math.ceil(count / most) + 1).astype(int).tolist()
        self.groups = [
            Group(config, depth, slice(*rows), given, self.memory, device, stack, self.graph)
            for depth in config.depths
            for rows in itertools.pairwise(ends)
        ]
        if start != "fresh":
            for group in self.groups:
                group.start_as(start, taught_by)

    def _targets(self, x: Tensor, test: bool = False) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Inputs and targets for every student, from each teacher's inputs."""
        c = self.config
        x = _each(x, len(c.rhos))
        last = self.teachers.forward(x)
        head, t = self.heads.unsqueeze(1), self.temperatures.view(1, -1, 1, 1)
        if test:
            last, head, t = last.double(), head.double(), t.double()
        target = tuple(
            _each(part.flatten(0, 1), len(c.seeds))
            for part in targets(c, last.unsqueeze(1), head, t)
        )
        return _each(x, len(c.temperatures) * len(c.seeds)), target

    def _update(self, x: Tensor) -> None:
        """All that a step computes."""
        x, target = self._targets(x)
        for group in self.groups:
            group.step(x, target)

    def advance(self) -> None:
        """Train for one step."""
        x = self.inputs(self.step)
        for group in self.groups:
            group.set_rate(self.step)
        if self.graph and self.advanced == 1:
            self._record(x)
        if self.replay:
            self.replay()
        else:
            self._update(x)
        self.step += 1
        self.advanced += 1
        test = self.step % self.config.test_every == 0 or self.step == self.config.steps
        if test or self.step % self.watch == 0:
            self.check()
        if test:
            self.test()

    def _record(self, x: Tensor) -> None:
        """Make a CUDA graph of a step; the step before has compiled and allocated everything."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(self.device)):
                self._update(x)
        except RuntimeError as error:
            self.graph = False
            reason = f"the steps could not be recorded as a CUDA graph ({error})"
            if self.must:
                raise RuntimeError(f"{reason}: train with graph=False") from error
            warnings.warn(f"{reason}: each is launched anew, which is slower", stacklevel=4)
            return
        # A test may ask memory for larger arrays; the graph goes on writing to these.
        self.recorded = dict(self.memory.arrays)
        self.replay = graph.replay

    def check(self) -> None:
        """Stop if a loss was no number since the last look."""
        first, self.watched = max(self.watched, self.step - self.advanced), self.step
        if not torch.stack([group.broken.any() for group in self.groups]).any():
            return
        group = next(group for group in self.groups if group.broken.any())
        which = group.students[int(group.broken.nonzero()[0, 0])]
        last = self.step - 1
        when = f"at step {last}" if first == last else f"at one of the steps {first} to {last}"
        raise FloatingPointError(
            f"the loss of the student of depth {which['depth']} at temperature "
            f"{which['temperature']:g} (rho {which['rho']:g}, teacher {which['teacher']}) is no "
            f"number {when}: lower learning_rate, which is {group.rate:.2g} there"
        )

    def test(self) -> None:
        sums: list[Any] = [0.0] * len(self.groups)
        drawn = self.inputs.draw(self.step, test=True).to(self.device)
        for x in drawn.split(self.config.batch, 1):
            x, target = self._targets(x, test=True)
            sums = [total + g.test(x, target) for total, g in zip(sums, self.groups, strict=True)]
        for total, group in zip(sums, self.groups, strict=True):
            means = (total / self.config.test_batches).tolist()
            self.records += [
                [*(student[name] for name in GRID), self.step, loss]
                for student, loss in zip(group.students, means, strict=True)
            ]

    def save(self, path: Path) -> None:
        """Write a checkpoint, all of it or nothing."""
        self.check()
        state = {
            "config": json.dumps(asdict(self.config)),
            "step": self.step,
            "seconds": self.seconds,
            "records": self.records,
            "kernel": self.kernel,
            "weights": [group.trained for group in self.groups],
            "adam": [group.adam.state_dict() for group in self.groups],
        }
        with archive.replacing(path) as partial:
            torch.save(state, partial)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint, if it belongs to this configuration."""
        state, saved = read_checkpoint(path, self.device)
        ours = json.loads(json.dumps(asdict(self.config)))
        free = {"scale"} if self.config.decay else {"scale", "steps"}
        other = [k for k in ours if saved.get(k) != ours[k] and k not in free]
        if other or state["step"] > self.config.steps:
            raise ValueError(
                f"{path} belongs to a run with other {', '.join(other) or 'steps'}: "
                "remove it, or name another checkpoint"
            )
        self.step, self.seconds, self.records = state["step"], state["seconds"], state["records"]
        self.kernel = state.get("kernel", "")
        # Another device stacks the students of a depth in fewer or more groups.
        each = len(state["weights"]) // len(self.config.depths)
        for group in self.groups:
            first = each * self.config.depths.index(group.depth)
            part = slice(first, first + each)
            group.load(state["weights"][part], state["adam"][part])


def _each(x: Tensor, times: int) -> Tensor:
    """Each entry of the first axis several times; ``repeat_interleave`` may wait for the GPU."""
    return x.unsqueeze(1).expand(-1, times, *x.shape[1:]).flatten(0, 1).contiguous()


def read_checkpoint(path: str | os.PathLike, device: Any = "cpu") -> tuple[dict, dict]:
    """What :meth:`Trainer.save` wrote, and the configuration in it."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        return state, json.loads(state["config"])
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is not a whole checkpoint of depthutil.toy: remove it to begin again"
        ) from error


def by_student(trainer: Trainer) -> dict[tuple, tuple[Any, ...]]:
    """Each student's ``w1, b, w2, head`` by its values of ``GRID``; no head with ``"none"``."""
    found = {}
    for group in trainer.groups:
        for i, student in enumerate(group.students):
            weights = [weight[:, i].cpu().clone() for weight in group.weights]
            head = None if trainer.config.head == "none" else group.head[i].cpu().clone()
            found[tuple(student.values())] = (*weights, head)
    return found


def own_stream(device: torch.device) -> AbstractContextManager:
    """A queue of work of its own on a GPU: the default one cannot be recorded."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))
