"""Growing deeper in the middle of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from depthutil import _checks, _runs
from depthutil.stream import anatomy
from depthutil.surgery.arranging import arrange

METHODS = ("midas", "lidas", "last", "random")


def plan(method: str, depth: int, block: int) -> list[int]:
    """Which layers a grown model's layers are copies of.

    Of n blocks of ``block`` layers each,

    - ``"midas"`` (Saunshi et al., arXiv 2409.19044) copies the middle block, number
      ⌈n/2⌉ − 1 from 0, and puts the copy behind it;
    - ``"lidas"`` (Kapl et al., arXiv 2512.08819) copies the layers around the exact middle c of
      the layers, from c − block/2 up to c + block/2, and puts the copy behind them. Figure 2 of
      the paper settles what its formula leaves open. The two are the same where n is odd;
    - ``"last"`` copies the last block (gradual stacking);
    - ``"random"`` puts new layers with random weights where MIDAS puts its copies: a control
      for the copying.

    Parameters
    ----------
    method : str
    depth, block : int
        Layers now, and layers to add; depth is a multiple of ``block``.

    Returns
    -------
    list of int
        Places from 0 on, one for each of the ``depth + block`` layers. Where a place stands for
        the second time, the layer is a copy.

    Raises
    ------
    ValueError
        If there is no such method, or depth is no multiple.

    Examples
    --------
    From eight layers with blocks of four, as in Kapl et al.:

    >>> plan("midas", 8, 4)
    [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]
    >>> plan("lidas", 8, 4)
    [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7]
    """
    method = _checks.word(method, METHODS, "method")
    depth, block = _checks.count(depth, "depth"), _checks.count(block, "block")
    if depth % block:
        raise ValueError(f"a depth of {depth} is no multiple of blocks of {block} layers")
    if method == "lidas":
        first = (depth - block) // 2
    elif method == "last":
        first = depth - block
    else:
        first = (math.ceil(depth / block / 2) - 1) * block
    end = first + block
    return [*range(end), *range(first, end), *range(end, depth)]


def grow(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    method: str = "midas",
    block: int = 1,
    *,
    seed: int = 0,
) -> Any:
    """Make a model deeper by ``block`` layers, copied by a :func:`plan`, and train on from there.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Changed in place.
    optimizer : torch.optim.Optimizer, optional
        Copied layers begin with a copy of its state of what they are copies of; random ones with
        none.
    method : {"midas", "lidas", "last", "random"}
    block : int
        Layers of a block; the model's depth is a multiple of it.
    seed : int
        Of random layers, whose weights have the means and standard deviations of the layers in
        whose place they come: not what the model began with, but what training has made of it.
        What is drawn depends on the depth, too: one seed serves all stages of a growth, and no
        two of them shuffle alike.

    Returns
    -------
    transformers.PreTrainedModel
        The same object.

    Raises
    ------
    ValueError
        As :func:`plan` and :func:`arrange`.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=4, n_head=2))
    >>> grow(model, method="lidas", block=2).config.n_layer
    6
    """
    depth, seed = anatomy(model).depth, _checks.count(seed, "seed", low=0)
    places = plan(method, depth, block)
    arrange(model, places, optimizer=optimizer)
    if method == "random":
        random = _runs.generator("grow", seed, depth)
        copies = [i for i, place in enumerate(places) if place in places[:i]]
        with torch.no_grad():
            for number in copies:
                for weight in anatomy(model).blocks[number].parameters():
                    order = torch.randperm(weight.numel(), generator=random).to(weight.device)
                    weight.copy_(weight.flatten()[order].view_as(weight))
                    if optimizer is not None:
                        optimizer.state.pop(weight, None)
    return model


def stages(steps: int, depths: Sequence[int], alpha: float = 1.0) -> list[int]:
    """At which steps a model grows, by PROP-α.

    Stage i of k lasts for a share of the steps that is proportional to i^α (Saunshi et al.,
    arXiv 2409.19044).

    Parameters
    ----------
    steps : int
        Of all stages together. Kapl et al. (arXiv 2512.08819) let growth end before the learning
        rate falls.
    depths : sequence of int
        Of the stages, rising.
    alpha : float

    Returns
    -------
    list of int
        The step after which each stage ends, the last one ``steps``.

    Examples
    --------
    >>> stages(2100, [2, 4, 6, 8, 10, 12])
    [100, 300, 600, 1000, 1500, 2100]
    """
    shares = np.arange(1, len(depths) + 1) ** float(alpha)
    ends = np.cumsum(shares) / shares.sum() * _checks.count(steps, "steps")
    return [round(end) for end in ends]
