"""Several blocks folded into one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from depthutil import _checks
from depthutil.stream import Stream, anatomy, computing_as, hidden, rewritten, with_tensor
from depthutil.surgery.arranging import alike, checked, drop, sharing


def fold(
    model: nn.Module,
    blocks: Sequence[int],
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> Any:
    """Let one block stand for several that follow one another.

    Layer Collapse (Yang et al., arXiv 2402.11187, equation 1): of blocks f to f + m the first
    gets all of its parameters, norms included, as

        θ_f + Σ_k (θ_{f+k} − θ_f),   k = 1 … m,

    and the others are dropped. The differences are those from the block as it was. (The official
    code adds them one after the other to a block that has changed meanwhile; its sum
    telescopes, and leaves θ_{f+m}, the last block. The two are one for m = 1.)

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Changed in place.
    blocks : sequence of int
        At least two neighbours, from the first to the last, from 0 on.
    optimizer : torch.optim.Optimizer, optional
        Forgets the weights of blocks that go; what it knew of the first block's is kept.

    Returns
    -------
    transformers.PreTrainedModel
        The same object.

    Raises
    ------
    ValueError
        If blocks are no neighbours, not of one kind, or the first shares its weights with a
        block that stays. The model is then as it was.

    Examples
    --------
    Copies of a block fold back into what they are copies of.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from depthutil.surgery import arrange
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=2, n_head=2)).eval()
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> before = model(ids).logits
    >>> grown = arrange(model, [0, 0, 0, 1])
    >>> torch.equal(fold(grown, [0, 1, 2])(ids).logits, before), model.config.n_layer
    (True, 2)
    """
    parts = anatomy(model)
    group = _neighbours(model, blocks, parts.depth)
    first = parts.blocks[group[0]]
    weights = _sum(parts.blocks, group)
    drop(model, group[1:], optimizer=optimizer)
    _put(first, weights)
    return model


def laco(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    size: int,
    threshold: float,
    lowest: int = 0,
    interval: int = 1,
) -> tuple[Any, pd.DataFrame]:
    """Fold from the top down, as long as the last states stay like those of the whole model.

    Algorithm 1 of Yang et al. (arXiv 2402.11187). ``size`` blocks are tried at a time, first
    those at the end. If the last states' cosine with the whole model's is above the threshold,
    they are folded for good, and the search goes on ``interval`` blocks below; otherwise one
    block below.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Changed in place.
    batches : iterable
        As :func:`depthutil.models.batches` makes them; a few sentences in the paper.
    size : int
        How many blocks become one, at least 2.
    threshold : float
        From −1 to 1. Cosines are of states after the final norm, a mean over positions.
    lowest : int
        The first block that may be folded.
    interval : int
        At least 1.

    Returns
    -------
    transformers.PreTrainedModel
        The same object.
    pandas.DataFrame
        What was tried, in this order: ``first`` (the group's first block, as blocks were counted
        then), ``cosine``, ``folded`` (whether it was), and ``depth`` (blocks afterwards).

    Raises
    ------
    ValueError
        If a number is impossible, or no batch is given.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=4, n_head=2))
    >>> smaller, tried = laco(model, [torch.tensor([[1, 2, 3]])], size=2, threshold=-1.0)
    >>> tried["depth"].tolist(), smaller.config.n_layer
    ([3, 2, 1], 1)
    """
    live = Stream(model)
    size, interval = _checks.count(size, "size", low=2), _checks.count(interval, "interval")
    lowest = _checks.count(lowest, "lowest", low=0)
    threshold = _checks.number(threshold, "threshold", low=-1, high=1)
    if lowest + size > live.parts.depth:
        raise ValueError(
            f"from block {lowest} on there are no {size} blocks to fold: the model has "
            f"{live.parts.depth}"
        )
    ready = [live.inputs(batch, "all", number) for number, batch in enumerate(batches)]
    if not ready:
        raise ValueError("there is no batch: models.batches(tokenizer, texts) makes some")
    rows: list[tuple[int, float, bool, int]] = []
    with live.open():
        whole = [live.run(inputs) for inputs, _ in ready]
        first = live.parts.depth - size
        while first >= lowest:
            group = range(first, first + size)
            alike_ = _cosine(Stream(model), group, ready, whole)
            folded = alike_ > threshold
            if folded:
                fold(model, group)
            depth = anatomy(model).depth
            rows.append((first, alike_, folded, depth))
            first = min(first - (interval if folded else 1), depth - size)
    return model, pd.DataFrame(rows, columns=["first", "cosine", "folded", "depth"])


def _neighbours(model: nn.Module, blocks: Sequence[int], depth: int) -> list[int]:
    """Blocks that can be folded, or a ValueError."""
    group = checked(blocks, depth)
    if len(group) < 2 or group != list(range(group[0], group[0] + len(group))):
        raise ValueError(f"blocks to fold are two neighbours or more, in order, not {group}")
    parts = anatomy(model)
    for other in group[1:]:
        alike(parts.blocks[group[0]], parts.blocks[other], group[0], other)
    owners = sharing(model)
    staying = [i for i in range(depth) if i not in group and owners[i] == owners[group[0]]]
    if staying:
        raise ValueError(
            f"block {group[0]} shares its weights with block {staying[0]}, which stays: fold "
            "models whose blocks have weights of their own"
        )
    return group


def _sum(blocks: Sequence[nn.Module], group: Sequence[int]) -> dict[str, Tensor]:
    """The folded block's parameters; 16 bits are added up in 32."""
    each = [dict(blocks[number].named_parameters()) for number in group]
    found = {}
    for name, own in each[0].items():
        start = own.detach() if own.dtype == torch.float64 else own.detach().float()
        total = start.clone()
        for other in each[1:]:
            total += other[name].detach().to(total) - start
        found[name] = total.to(own.dtype)
    return found


@torch.no_grad()
def _put(block: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, weight in block.named_parameters():
        weight.copy_(weights[name])


def _cosine(live: Stream, group: Sequence[int], ready: list, whole: Sequence[Tensor]) -> float:
    """How like the whole model's the last states are if a group were folded; nothing stays so."""
    blocks = live.parts.blocks
    first, *others = (blocks[number] for number in group)
    folded = copy.deepcopy(first)
    _put(folded, _sum(blocks, group))

    def nothing(module: nn.Module, args: tuple, kwargs: Mapping, output: Any) -> Any:
        return with_tensor(output, hidden(args, kwargs))

    total = count = 0.0
    with computing_as((first, folded)), rewritten(others, nothing):
        for (inputs, real), before in zip(ready, whole, strict=True):
            after = live.run(inputs)
            cosines = torch.cosine_similarity(before.double(), after.double(), dim=-1)
            total += float(cosines[real.to(cosines.device)].sum())
            count += float(real.sum())
    return total / count
