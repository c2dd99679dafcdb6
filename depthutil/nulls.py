"""Networks to compare a trained one with: the same shape, and nothing learned.

What a trained network does, an untrained one may do too, or one whose weights have the
trained sizes and no order. Two nulls, because they differ: training also makes weights larger.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def untrained(model: Any, seed: int = 0, *, std: float | None = None) -> Any:
    """A network of the same shape as it is before training.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Left as it is.
    seed : int
        Of the new weights; the global random state is left alone.
    std : float, optional
        Standard deviation of the weights that ``transformers`` draws (``initializer_range``).
        By default what the model's configuration says, which for many models is not how
        their training began: the depth ladder's began with ``0.4 / width**0.5``.

    Returns
    -------
    transformers.PreTrainedModel
        In evaluation mode, of the same precision and on the same device.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2))
    >>> one, again, other = (untrained(model, seed).transformer.wte.weight for seed in (0, 0, 1))
    >>> torch.equal(one, again), torch.equal(one, other)
    (True, False)
    """
    config = copy.deepcopy(model.config)
    if std is not None:
        config.initializer_range = std
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = type(model)(config)
    return made.to(device=model.device, dtype=model.dtype).eval()


def shuffled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The trained weights, with the entries of each matrix (or vector) in random order.

    Sizes stay what training made of them; whatever the weights encode is gone.

    Parameters
    ----------
    model : torch.nn.Module
        Left as it is.
    seed : int
        Of the orders; the global random state is left alone.

    Returns
    -------
    torch.nn.Module

    Examples
    --------
    >>> model = nn.Linear(4, 4)
    >>> other = shuffled(model)
    >>> torch.equal(other.weight, model.weight)
    False
    >>> torch.equal(other.weight.flatten().sort().values, model.weight.flatten().sort().values)
    True
    """
    other, rng = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            order = torch.randperm(weight.numel(), generator=rng).to(weight.device)
            weight.copy_(weight.flatten()[order].view_as(weight))
    return other
