"""Models whose weights lie between those of two others, and controls at the same distance."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depthutil import _checks, _runs
from depthutil.stream import anatomy
from depthutil.surgery.arranging import checked

PARTS = ("block", "attention", "mlp")


def mixed(
    model: nn.Module,
    other: nn.Module,
    share: float,
    blocks: int | Sequence[int] | None = None,
    *,
    part: str = "block",
) -> Any:
    """A model part of whose weights lie on the line between those of two models.

    Its loss at half of the way, less the mean loss of the two whole models, is the barrier of
    layer-wise linear connectivity (Adilova et al., arXiv 2307.06966, definition 2).

    Parameters
    ----------
    model, other : transformers.PreTrainedModel
        Of one architecture; neither is changed.
    share : float
        Of the other: 0 gives the model's own weights, 1 the other's.
    blocks : int or sequence of int, optional
        Which blocks' weights, from 0 on; by default all weights, embedding and head included.
    part : {"block", "attention", "mlp"}
        Of the blocks; norms belong to neither attention nor MLP.

    Returns
    -------
    transformers.PreTrainedModel
        A copy of the model.

    Raises
    ------
    ValueError
        If the two are not of one architecture, or there is no such block or part.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> small = GPT2Config(vocab_size=8, n_embd=4, n_layer=2, n_head=2)
    >>> one, other = GPT2LMHeadModel(small), GPT2LMHeadModel(small)
    >>> name = "transformer.h.1.mlp.c_fc.weight"
    >>> halfway, *ends = (m.state_dict()[name] for m in (mixed(one, other, 0.5, 1), one, other))
    >>> torch.allclose(halfway, sum(ends) / 2)
    True
    """
    share = _checks.number(share, "share")

    def between(own: Tensor, theirs: Tensor) -> Tensor:
        return own.lerp(theirs, share)

    return _moved(model, other, blocks, part, between)


def perturbed(
    model: nn.Module,
    other: nn.Module,
    share: float,
    blocks: int | Sequence[int] | None = None,
    *,
    part: str = "block",
    seed: int = 0,
) -> Any:
    """As far from a model as :func:`mixed` goes, but in a random direction.

    Each tensor of weights is moved by ``share`` times the length of its difference between the
    two models. What a way towards the other model costs beyond this is a matter of its
    direction, and not of its length.

    Parameters
    ----------
    model, other, share, blocks, part
        As in :func:`mixed`.
    seed : int
        Of the directions.

    Returns
    -------
    transformers.PreTrainedModel
        A copy of the model.

    Raises
    ------
    ValueError
        As :func:`mixed`.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> small = GPT2Config(vocab_size=8, n_embd=4, n_layer=2, n_head=2)
    >>> one, other = GPT2LMHeadModel(small), GPT2LMHeadModel(small)
    >>> name = "transformer.h.1.mlp.c_fc.weight"
    >>> away = [m(one, other, 0.5, 1).state_dict()[name] - one.state_dict()[name]
    ...         for m in (mixed, perturbed)]
    >>> torch.allclose(away[0].norm(), away[1].norm()), torch.allclose(*away)
    (True, False)
    """
    share = _checks.number(share, "share")
    rng = _runs.generator("perturbed", _checks.count(seed, "seed", low=0))

    def away(own: Tensor, theirs: Tensor) -> Tensor:
        drawn = torch.randn(own.shape, generator=rng).to(own)
        length = share * (theirs - own).norm() / drawn.norm().clamp(min=1e-12)
        return own + length * drawn

    return _moved(model, other, blocks, part, away)


@torch.no_grad()
def _moved(
    model: nn.Module,
    other: nn.Module,
    blocks: int | Sequence[int] | None,
    part: str,
    new: Callable[[Tensor, Tensor], Tensor],
) -> Any:
    _checks.word(part, PARTS, "part")
    result = copy.deepcopy(model)
    moved: set[Tensor] = set()  # blocks may share weights
    for mine, theirs in zip(
        _modules(result, blocks, part), _modules(other, blocks, part), strict=True
    ):
        ours, others = dict(mine.named_parameters()), dict(theirs.named_parameters())
        if {name: w.shape for name, w in ours.items()} != {n: w.shape for n, w in others.items()}:
            raise ValueError("the two models' weights have other names or shapes: mix two of one")
        for name, weight in ours.items():
            if weight not in moved:
                weight.copy_(new(weight.detach(), others[name].detach().to(weight)))
                moved.add(weight)
    return result


def _modules(model: nn.Module, blocks: int | Sequence[int] | None, part: str) -> list[nn.Module]:
    parts = anatomy(model)
    if blocks is None and part == "block":
        return [model]
    given: Any = range(parts.depth) if blocks is None else blocks
    single = isinstance(given, int | np.integer)
    numbers = checked([given] if single else given, parts.depth)
    if part == "block":
        return [parts.blocks[number] for number in numbers]
    modules = parts.attention if part == "attention" else parts.mlp
    if modules is None:
        raise ValueError(f"this {parts.family} model names no {part}: take part='block'")
    return [modules[number] for number in numbers]
