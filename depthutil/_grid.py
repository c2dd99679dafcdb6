"""Many networks at once: stacks of networks of one depth, and the grid that trains them.

:class:`Stack` is the only place that knows how a residual stack is computed forward and
backward; its plain twin is ``Network`` of ``depthutil.toy_model``.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from depthutil.toy_model import (
    _EPS,
    GRID,
    ToyConfig,
    inputs,
    losses,
    rms,
    student_weights,
    targets,
    teacher_weights,
)

# On a CPU, as many students are stacked as keep one layer's activations in a core's cache.
CACHE_BYTES = 2**20


class Stack:
    """Networks of one depth side by side: each layer of all of them is one batched product.

    Parameters
    ----------
    w1, b, w2 : torch.Tensor
        ``(mlps, networks, hidden, width)``, ``(mlps, networks, hidden)`` and
        ``(mlps, networks, width, hidden)``.
    order : int
        1, or 2 for midpoint steps.
    memory : Memory, optional
        Where :meth:`backward` finds what :meth:`forward` left. Stacks that take turns
        share one.
    """

    def __init__(self, w1: Tensor, b: Tensor, w2: Tensor, order: int = 1, memory=None):
        self.w1, self.b, self.w2, self.order = w1, b, w2, order
        self.memory = memory or Memory()

    @torch.no_grad()
    def forward(self, x: Tensor, keep: bool = False, states: bool = False) -> Tensor:
        """The last state of ``x``, ``(networks, batch, width)``, or all, layer first."""
        mlps, hidden, take = len(self.w1), self.w1.shape[2], self.memory.take
        slots = mlps if keep else 1
        self.u = take("u", (slots, *x.shape), x)
        self.inverse = take("inverse", (slots, *x.shape[:2], 1), x)
        self.r = take("r", (slots, *x.shape[:2], hidden), x)
        self.square, self.pre = (take(name, self.r.shape[1:], x) for name in ("square", "pre"))
        x = rms(x)
        stream = [x.clone()]
        for m in range(0, mlps, self.order):
            if self.order == 2:
                middle = self._write(x.clone(), x, m, 0.5, keep)
                self._write(x, middle, m + 1, 1.0, keep)
            else:
                self._write(x, x, m, 1.0, keep)
            if states:
                stream.append(x.clone())
        return torch.stack(stream) if states else x

    def _write(self, to: Tensor, read: Tensor, m: int, share: float, keep: bool) -> Tensor:
        """Add to a stream, in place, a share of what MLP ``m`` answers to ``read``."""
        slot = m if keep else 0
        u, inverse, r = self.u[slot], self.inverse[slot], self.r[slot]
        torch.linalg.vector_norm(read, dim=-1, keepdim=True, out=inverse)
        inverse.square_().div_(read.shape[-1]).add_(_EPS).rsqrt_()
        torch.mul(read, inverse, out=u)
        torch.baddbmm(self.b[m].unsqueeze(1), u, self.w1[m].mT, out=r).relu_()
        return to.baddbmm_(torch.mul(r, r, out=self.square), self.w2[m].mT, alpha=share)

    @torch.no_grad()
    def backward(self, grad: Tensor, into: Sequence[Tensor]) -> None:
        """From the gradient of the last state to those of the weights.

        Parameters
        ----------
        grad : torch.Tensor
            ``(networks, batch, width)``, after a ``forward`` with ``keep=True``.
        into : sequence of torch.Tensor
            Three tensors of the weights' shapes, overwritten.
        """
        grad = grad.clone()
        for m in reversed(range(0, len(self.w1), self.order)):
            if self.order == 2:
                middle = torch.zeros_like(grad)
                self._pull(grad, m + 1, into, onto=middle)
                grad += middle
                self._pull(middle / 2, m, into, onto=grad)
            else:
                self._pull(grad, m, into, onto=grad)

    def _pull(self, grad: Tensor, m: int, into: Sequence[Tensor], onto: Tensor) -> None:
        """From the gradient of what MLP ``m`` wrote to its weights' and, added, what it read's."""
        w1_grad, b_grad, w2_grad = into
        u, inverse, r = self.u[m], self.inverse[m], self.r[m]
        torch.bmm(grad.mT, torch.mul(r, r, out=self.square), out=w2_grad[m])
        # d(r²) = 2 r dr, and r is zero where the relu was: no mask is needed.
        pre = torch.bmm(2 * grad, self.w2[m], out=self.pre).mul_(r)
        torch.bmm(pre.mT, u, out=w1_grad[m])
        torch.sum(pre, 1, out=b_grad[m])
        du = torch.bmm(pre, self.w1[m])
        along = (du * u).sum(-1, keepdim=True)
        onto.addcmul_(du.addcmul_(u, along, value=-1 / u.shape[-1]), inverse)


class Memory:
    """Arrays that are written anew at every step, kept between steps."""

    def __init__(self):
        self._arrays: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """An array of this shape whose content is whatever was there."""
        size = math.prod(shape)
        if name not in self._arrays or self._arrays[name].numel() < size:
            self._arrays[name] = like.new_empty(size)
        return self._arrays[name][:size].view(shape)


class Group:
    """Students of one depth that are stepped together, with their heads and their Adam."""

    def __init__(self, config: ToyConfig, depth: int, rows: slice, given, memory: Memory, device):
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
        self.stack = Stack(*self.weights, config.order, memory)
        self.head = torch.stack(heads).to(device) if config.head == "own" else given[rows]
        self.trained = [*self.weights, *([self.head] if config.head == "own" else [])]
        # One pass over the weights instead of a dozen; PyTorch 2.2 has it on GPUs only.
        fused = device.type == "cuda" or torch.__version__ >= "2.4"
        options = {"fused": True} if fused else {"foreach": True}
        self.adam = torch.optim.Adam(self.trained, **options)
        self.temperature = torch.tensor(
            [[[s["temperature"]]] for s in self.students], dtype=w1[0].dtype, device=device
        )

    def step(self, step: int, x: Tensor, target: tuple[Tensor, ...]) -> Tensor:
        """One Adam step of every student; their losses before it."""
        last = self.stack.forward(x[self.rows], keep=True).requires_grad_()
        own = self.config.head == "own"
        head = self.head.detach().requires_grad_() if own else self.head
        target = tuple(part[self.rows] for part in target)
        loss = losses(self.config, last, head, self.temperature, target)
        # Each student's loss is its own: the gradient of their sum is every student's.
        grads = torch.autograd.grad(loss.sum(), [last, head] if own else [last])
        for i, weight in enumerate(self.weights):
            weight.grad = self.memory.take(f"grad{i}", weight.shape, weight)
        if own:
            # The fused Adam reads memory in order, whatever the strides say.
            self.head.grad = grads[1].contiguous()
        self.stack.backward(grads[0], [weight.grad for weight in self.weights])
        self.adam.param_groups[0]["lr"] = self.config.rate(self.depth, step)
        self.adam.step()
        for weight in self.trained:
            weight.grad = None
        return loss.detach()

    @torch.no_grad()
    def test(self, x: Tensor, target: tuple[Tensor, ...]) -> Tensor:
        """Losses on these inputs, in float64: small ones are differences of large numbers."""
        last = self.stack.forward(x[self.rows]).double()
        head = None if self.config.head == "none" else self.head.double()
        target = tuple(part[self.rows] for part in target)
        return losses(self.config, last, head, self.temperature.double(), target)


class Trainer:
    """The grid: teachers, groups of students, and everything a checkpoint has to hold."""

    def __init__(self, config: ToyConfig, device: torch.device):
        self.config, self.device, memory = config, device, Memory()
        self.step, self.seconds, self.records = 0, 0.0, []
        pairs = list(itertools.product(config.teachers, config.rhos))
        parts = [teacher_weights(config, teacher, rho) for teacher, rho in pairs]
        w1, b, w2, heads = zip(*parts, strict=True)
        w1, b, w2 = (torch.stack(part, 1).to(device) for part in (w1, b, w2))
        self.teachers = Stack(w1, b, w2, memory=memory)
        self.heads = torch.stack(heads).to(device)
        self.temperatures = torch.tensor(config.temperatures, dtype=w1.dtype, device=device)
        count = len(config.students(0))
        given = self.heads.repeat_interleave(count // len(pairs), 0)
        fits = CACHE_BYTES // (config.batch * config.hidden * w1.element_size())
        most = max(1, fits) if device.type == "cpu" else count
        ends = np.linspace(0, count, math.ceil(count / most) + 1).astype(int).tolist()
        self.groups = [
            Group(config, depth, slice(*rows), given, memory, device)
            for depth in config.depths
            for rows in itertools.pairwise(ends)
        ]

    def _batch(self, step: int, test: bool = False) -> Iterator[tuple[Tensor, tuple]]:
        """Inputs and targets for every student of the grid, in pieces of ``batch`` inputs."""
        c = self.config
        drawn = torch.stack([inputs(c, teacher, step, test) for teacher in c.teachers])
        for x in drawn.to(self.device).split(c.batch, 1):
            x = x.repeat_interleave(len(c.rhos), 0)
            last = self.teachers.forward(x)
            head, t = self.heads.unsqueeze(1), self.temperatures.view(1, -1, 1, 1)
            if test:
                last, head, t = last.double(), head.double(), t.double()
            target = tuple(
                part.flatten(0, 1).repeat_interleave(len(c.seeds), 0)
                for part in targets(c, last.unsqueeze(1), head, t)
            )
            yield x.repeat_interleave(len(c.temperatures) * len(c.seeds), 0), target

    def advance(self) -> None:
        ((x, target),) = self._batch(self.step)
        for group in self.groups:
            loss = group.step(self.step, x, target)
            if not torch.isfinite(loss).all():
                which = group.students[int((~torch.isfinite(loss)).nonzero()[0, 0])]
                raise FloatingPointError(
                    f"the loss of the student of depth {which['depth']} at temperature "
                    f"{which['temperature']:g} (rho {which['rho']:g}, teacher "
                    f"{which['teacher']}) is no number at step {self.step}: lower "
                    f"learning_rate, which is {self.config.rate(group.depth, self.step):.2g} there"
                )
        self.step += 1
        if self.step % self.config.test_every == 0 or self.step == self.config.steps:
            self.test()

    def test(self) -> None:
        sums = [0.0] * len(self.groups)
        for x, target in self._batch(self.step, test=True):
            sums = [total + g.test(x, target) for total, g in zip(sums, self.groups, strict=True)]
        for total, group in zip(sums, self.groups, strict=True):
            means = (total / self.config.test_batches).tolist()
            self.records += [
                [*(student[name] for name in GRID), self.step, loss]
                for student, loss in zip(group.students, means, strict=True)
            ]

    def save(self, path: Path) -> None:
        """Write a checkpoint, all of it or nothing."""
        buffer = io.BytesIO()
        state = {
            "config": json.dumps(asdict(self.config)),
            "step": self.step,
            "seconds": self.seconds,
            "records": self.records,
            "weights": [group.trained for group in self.groups],
            "adam": [group.adam.state_dict() for group in self.groups],
        }
        torch.save(state, buffer)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with partial.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

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
        for group, weights, adam in zip(self.groups, state["weights"], state["adam"], strict=True):
            for ours, saved in zip(group.trained, weights, strict=True):
                ours.copy_(saved)
            group.adam.load_state_dict(adam)


def read_checkpoint(path: str | os.PathLike, device: Any = "cpu") -> tuple[dict, dict]:
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        return state, json.loads(state["config"])
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is not a whole checkpoint of depthutil.toy: remove it to begin again"
        ) from error


def by_student(trainer: Trainer) -> dict[tuple, tuple[Tensor, ...]]:
    found = {}
    for group in trainer.groups:
        for i, student in enumerate(group.students):
            weights = [weight[:, i].cpu().clone() for weight in group.weights]
            head = None if trainer.config.head == "none" else group.head[i].cpu().clone()
            found[tuple(student.values())] = (*weights, head)
    return found


@contextmanager
def cpu(threads: int | None) -> Iterator[None]:
    """Set the number of threads; count numbers below 1e-38 as zero, which costs 100 times less."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
