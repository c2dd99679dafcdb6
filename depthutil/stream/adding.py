"""Which of a block's modules write to the stream: those whose outputs add up to its change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depthutil.stream.hooks import watched
from depthutil.stream.parts import Write, is_norm


class Inside:
    """What all modules of a block read and return in one pass."""

    def __init__(self, block: nn.Module, tokens: int):
        self.names = {module: name for name, module in block.named_modules() if name}
        self.tokens = tokens
        self.outputs: dict[nn.Module, list[Tensor]] = {}
        self.inputs: dict[nn.Module, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            gives = (
                first_tensor(*output[:1])
                if isinstance(output, tuple | list)
                else first_tensor(output)
            )
            reads = first_tensor(*args, *kwargs.values())
            if gives is not None and gives.is_floating_point():
                self.outputs.setdefault(module, []).append(gives.detach().clone())
            if reads is not None:
                self.inputs[module] = reads.detach().clone()

        with watched(self.names, keep):
            yield

    def value(self, module: nn.Module) -> Tensor:
        return exact(self.outputs[module][0]).reshape(self.tokens, -1)

    def distinct(self, real: Tensor) -> dict[nn.Module, Tensor]:
        """Outputs that could be writes, in order; of equal ones the outermost module's."""
        kept: dict[nn.Module, Tensor] = {}
        for module, got in self.outputs.items():  # in the order in which modules end
            if len(got) != 1 or got[0].numel() % self.tokens:
                continue
            value = self.value(module)[real]
            twin = next((m for m, v in kept.items() if same(v, value)), None)
            if twin is not None:
                if self._depth(module) >= self._depth(twin):
                    continue
                del kept[twin]
            kept[module] = value
        return kept

    def computes(self, module: nn.Module) -> nn.Module | None:
        """The module that computes a write, where it is one module.

        After it may come a norm or dropout, whose output is what is added. A bare linear map
        is the last step of the module that holds it, or, among others of the block (OPT's
        ``fc2``), of none.
        """
        if isinstance(module, nn.Dropout) or is_norm(module):
            reads = self.inputs.get(module, torch.zeros(0)).flatten()
            before = [
                m
                for m, got in self.outputs.items()
                if m is not module
                and same(got[0].flatten(), reads)
                and next(m.parameters(), None) is not None
            ]
            if not before:
                return None
            module = min(before, key=self._depth)
        if next(module.children(), None) is not None:
            return module
        top = self.names[module].partition(".")[0]
        return next((m for m, name in self.names.items() if name == top and m is not module), None)

    def _depth(self, module: nn.Module) -> int:
        return self.names[module].count(".")


def adding_up(
    values: Mapping[nn.Module, Tensor], change: Tensor, start: Tensor, eps: float
) -> list[Write] | None:
    """Two outputs, or one, that times a number each make up a block's change."""
    values = {
        m: v
        for m, v in values.items()
        if v.shape == change.shape and v.norm() > 0 and not same(v, start)
    }
    modules = list(values)
    if not modules or not change.norm() > 0:
        return None
    stack = torch.stack([values[m].flatten() for m in modules])
    products, aims = stack @ stack.T, stack @ change.flatten()
    total = float(change.norm() ** 2)

    def fits(at: list[int]) -> np.ndarray | None:
        """The numbers, if with them the outputs make up the change of every token."""
        some = products[at][:, at]
        try:
            scales = torch.linalg.solve(some, aims[at])
        except RuntimeError:  # one is a multiple of the other
            return None
        # Far off: spare the rest.
        if total - float(scales @ aims[at]) > max(1e-4, 64 * eps**2) * total:
            return None
        # Ones where they will do; other numbers are as exact as they can be known.
        for tried in (torch.ones_like(scales), scales):
            parts = tried[:, None] * stack[at]
            gap = (parts.sum(0).view_as(change) - change).norm(dim=-1)
            sizes = start.norm(dim=-1) + parts.view(len(at), *change.shape).norm(dim=-1).sum(0)
            if bool((gap <= 4 * eps * sizes).all()) and float(tried.abs().min()) > 1e-3:
                return tried.numpy()
        return None

    best: tuple[tuple, list[Write]] | None = None
    for i in range(len(modules)):
        for j in range(i + 1, len(modules)):
            scales = fits([i, j])
            if scales is None:
                continue
            rank = (bool((scales != 1).any()), abs(scales[0] - scales[1]) > 64 * eps, -i - j)
            if best is None or rank < best[0]:
                pair = zip((modules[i], modules[j]), scales, strict=True)
                best = rank, [Write(module, float(scale)) for module, scale in pair]
    if best is not None:
        return best[1]
    for i in reversed(range(len(modules))):
        scales = fits([i])
        if scales is not None:
            return [Write(modules[i], float(scales[0]))]
    return None


def first_tensor(*things: Any) -> Tensor | None:
    return next((thing for thing in things if isinstance(thing, Tensor)), None)


def same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.to(one.device))


def exact(states: Tensor) -> Tensor:
    return states.detach().cpu().double()


def differ(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether what a module returned twice differs by more than the order of its sums makes."""
    eps = torch.finfo(dtype).eps
    return float((one - other).norm()) > (8 if eps < 1e-5 else 1) * eps * float(one.norm())
